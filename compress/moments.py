"""Second moments of the whole original model, gathered in one pass of the block loop before anything is compressed.

    stream   the mean over blocks of the moments of both normalised inputs, before the norms' gains; where the stream is only
             to be reordered, the mean energy of its channels as the linears see them, every input scaled to a sum of one
    heads    per block and KV head, the moment of the values, and of the keys and queries after rotary embedding
    hidden   per block, the energy of each inner channel of the MLP, where that is asked for

Cost: one forward pass without solving; memory as in the block loop, plus a d x d and blocks x heads small fp64 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.blockwise import Progress, start_runner
from compress.calibrate import data
from compress.calibrate.attention import observed_attention
from compress.calibrate.statistics import Gram, HeadGrams
from compress.memory import give_back_freed_memory
from compress.model import materialise, release
from compress.prepare import Prepared
from compress.reorder import stream_readers
from compress.rotation import Basis, norm_readers

_HIDDEN = "mlp.down_proj"  # reads the inner channels; not every model has one


@dataclass
class Moments:
    """Second moments of one pass, fp64; per block and head where they are mappings."""

    stream: Tensor  # [d, d], or [d] for a stream that is reordered
    values: dict[int, Tensor]
    keys: dict[int, Tensor]
    queries: dict[int, Tensor]
    hidden: dict[int, Tensor]  # energy of each inner channel of the MLP


def gather(
    prepared: Prepared, tokens: data.Tokens, progress: Progress, stream_basis: Basis = "pca", *, hidden: bool = False
) -> Moments:
    """Run the original model once, block by block; the stream's moments are those that its kind of basis needs.

    Raises:
        CompressError: activations that are not finite.
    """
    model, plan = prepared.model, prepared.plan
    runner = start_runner(prepared, tokens)
    width = model.config.get_text_config(decoder=True).hidden_size
    stream, channels = Gram(width, prepared.device), torch.zeros(width, dtype=torch.float64)
    moments = Moments(stream.sum_II, {}, {}, {}, {})
    progress.note(f"gathering second moments of {plan.num_blocks} blocks for the bases")
    for index in range(plan.num_blocks):
        prefix = f"{plan.blocks_name}.{index}."
        materialise(model, prepared.source, prefix, prepared.dtype, prepared.device)
        states = {"values": HeadGrams(), "keys": HeadGrams(), "queries": HeadGrams()}

        def see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, states: dict = states) -> None:
            grouped = query.unflatten(1, (key.shape[1], -1)).transpose(1, 2).flatten(0, 1)  # queries of one KV head
            repeats = grouped.shape[0] // query.shape[0]
            mask = None if runner.mask is None else runner.mask.repeat_interleave(repeats, dim=0)
            states["queries"].add(grouped, mask)
            states["keys"].add(key, runner.mask)
            states["values"].add(value, runner.mask)

        hooks, energies = [], {}

        weighed = [_HIDDEN] if hidden else []
        if stream_basis == "order":
            weighed += [names[0] for names in stream_readers(model.get_submodule(prefix[:-1]), model).values()]
        for name in weighed:

            def weigh(module: nn.Module, args: tuple, name: str = name, energies: dict = energies) -> None:
                energies[name] = energies.get(name, 0) + _energy(args[0], runner.mask)

            hooks.append(model.get_submodule(prefix + name).register_forward_pre_hook(weigh))
        if stream_basis == "pca":
            for norm in norm_readers():
                hooks.append(
                    model.get_submodule(prefix + norm).register_forward_pre_hook(
                        lambda module, args: stream.add(_normalised(module, args[0]), runner.mask)
                    )
                )
        try:
            with observed_attention(model, see):
                runner.run(index, keep=True)
        finally:
            for hook in hooks:
                hook.remove()
        release(model, prefix)
        give_back_freed_memory()
        if hidden:
            moments.hidden[index] = energies.pop(_HIDDEN)
        for energy in energies.values():
            channels += energy.cpu() / energy.sum().clamp_min(1e-300).cpu()
        for name, grams in states.items():
            getattr(moments, name)[index] = grams.mean()
    moments.stream = stream.mean() if stream_basis == "pca" else channels / max(1, 2 * plan.num_blocks)
    return moments


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)


def _energy(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squares of each channel over the tokens that count, fp64."""
    rows = x.flatten(0, -2) if mask is None else x[mask.to(x.device).bool()]
    return rows.float().square().sum(dim=0).double()
