"""The earlier pass of methods that rotate: second moments of the whole model first, bases from them, then the real run.

One pass of the block loop over the calibration text gathers, at the original model,

    stream   the sum over blocks of the moments of both normalised inputs, before the norms' gains
    heads    per block and KV head, the moment of the values, and of the keys and queries after rotary embedding

and, if asked, the Gram matrices of the weights that read them: a direction matters by how large it is and by how strongly
it is read (CoQuant, arXiv:2604.26378). The bases are kept in the staging directory, so a resumed run uses the same ones.
Cost: one forward pass without solving; a d x d and L x H small fp64 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.blockwise import Progress, start_runner
from compress.cache.attached import CACHE_MODULE
from compress.calibrate import data
from compress.calibrate.attention import observed_attention
from compress.calibrate.statistics import Gram, HeadGrams
from compress.errors import CompressError
from compress.layers import build
from compress.lineage import Lineage
from compress.model import build_skeleton, head_width, materialise, release
from compress.plan import HEAD
from compress.prepare import Prepared
from compress.rotation import (
    RotatedSource,
    Rotation,
    Wanted,
    final_norm_spec,
    hadamard_basis,
    high_per_head,
    norm_readers,
    pca_basis,
    require_rotatable,
)
from compress.source import Source
from compress.staging import BASES, write_bases
from compress.tensorfile import read_header, write_file

_CACHE_SEED = 17  # the random rotations inside the parts of the cache's bases


@dataclass
class Moments:
    """Second moments of one pass, fp64; per block and head where they are mappings."""

    stream: Tensor
    values: dict[int, Tensor]
    keys: dict[int, Tensor]
    queries: dict[int, Tensor]
    hidden: dict[int, Tensor]  # energy of each inner channel of the MLP


def gather(prepared: Prepared, tokens: data.Tokens, progress: Progress) -> Moments:
    """Run the original model once, block by block.

    Raises:
        CompressError: activations that are not finite.
    """
    model, plan = prepared.model, prepared.plan
    runner = start_runner(prepared, tokens)
    stream = Gram(model.config.get_text_config(decoder=True).hidden_size, prepared.device)
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

        hooks = [
            model.get_submodule(prefix + norm).register_forward_pre_hook(
                lambda module, args: stream.add(_normalised(module, args[0]), runner.mask)
            )
            for norm in norm_readers()
        ]
        energy: list[Tensor] = []
        hooks.append(
            model.get_submodule(f"{prefix}mlp.down_proj").register_forward_pre_hook(
                lambda module, args, energy=energy: energy.append(_energy(args[0], runner.mask))
            )
        )
        try:
            with observed_attention(model, see):
                runner.run(index, keep=True)
        finally:
            for hook in hooks:
                hook.remove()
        release(model, prefix)
        moments.hidden[index] = torch.stack(energy).sum(dim=0)
        for name, grams in states.items():
            getattr(moments, name)[index] = grams.mean()
    moments.stream = stream.mean()
    return moments


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)


def _energy(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squares of each channel over the tokens that count, fp64."""
    rows = x.flatten(0, -2) if mask is None else x[mask.to(x.device).bool()]
    return rows.float().square().sum(dim=0).double()


def rotation_bases(prepared: Prepared, wanted: Wanted, moments: Moments | None) -> dict[str, Tensor]:
    """`stream` `[d, d]` and `heads.<block>` `[H, D, D]` in fp64, `hidden.<block>` a permutation."""
    model, plan = prepared.model, prepared.plan
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(wanted.seed)
    bases: dict[str, Tensor] = {}
    if wanted.stream == "hadamard":
        bases["stream"] = hadamard_basis(config.hidden_size, generator)
    elif wanted.stream == "pca":
        moment = _mixed(moments.stream, lambda: _reader_gram(prepared), wanted.weight_share)
        bases["stream"] = pca_basis(moment, wanted.stream_high, generator)
    if wanted.hidden_order:
        bases.update({f"hidden.{index}": energy.argsort(stable=True) for index, energy in moments.hidden.items()})
    width, heads = head_width(model), config.num_key_value_heads
    for index in range(plan.num_blocks if wanted.heads != "none" else 0):
        if wanted.heads == "hadamard":
            bases[f"heads.{index}"] = hadamard_basis(width).expand(heads, -1, -1).contiguous()
            continue
        weights = _output_gram(prepared, index, heads, width) if wanted.weight_share else None
        bases[f"heads.{index}"] = torch.stack(
            [
                pca_basis(
                    _mixed(moment, lambda head=head, weights=weights: weights[head], wanted.weight_share),
                    wanted.heads_high,
                    generator,
                )
                for head, moment in enumerate(moments.values[index])
            ]
        )
    return bases


def _mixed(moment: Tensor, weights: Callable[[], Tensor], share: float) -> Tensor:
    """Moments of inputs and of weights, each brought to trace one."""
    if not share:
        return moment
    other = weights()
    tiny = torch.finfo(moment.dtype).tiny  # a part that is all zero has no say
    return sum(part * m / m.diagonal().sum().clamp_min(tiny) for part, m in ((1 - share, moment), (share, other)))


def _reader_gram(prepared: Prepared) -> Tensor:
    """Sum of W^T W over all linears that read the stream, gains of the norms included."""
    total: Tensor | float = 0.0
    for index in range(prepared.plan.num_blocks):
        prefix = f"{prepared.plan.blocks_name}.{index}."
        for norm, readers in norm_readers().items():
            gain = prepared.source.read(f"{prefix}{norm}.weight").float()
            for reader in readers:
                weight = prepared.source.read(f"{prefix}{reader}.weight").float() * gain
                total = total + (weight.T @ weight).double()
    return total


def _output_gram(prepared: Prepared, index: int, heads: int, width: int) -> Tensor:
    """W_o^T W_o of the columns that read each KV head, `[H, D, D]`."""
    weight = prepared.source.read(f"{prepared.plan.blocks_name}.{index}.self_attn.o_proj.weight").double()
    columns = weight.unflatten(1, (heads, -1, width))  # [N, H, query heads, D]
    return torch.einsum("nhqd,nhqe->hde", columns, columns)


def wanted_rotation(prepared: Prepared) -> Wanted | None:
    """The rotation that the rules of a recipe ask for; None when none does.

    Raises:
        CompressError: rules that ask for different rotations, or a model that cannot be rotated.
    """
    config = prepared.model.config.get_text_config(decoder=True)
    asked = {rule.rotation(config.hidden_size, head_width(prepared.model)) for rule in prepared.recipe.weights} - {None}
    if len(asked) > 1:
        raise CompressError("the rules ask for different rotations of one model; give all of them the same basis options")
    if not asked:
        return None
    require_rotatable(prepared.model)
    return asked.pop()


def rotated(prepared: Prepared, tokens: data.Tokens, staging: Path, lineage: Lineage, progress: Progress) -> Prepared:
    """The same run on the rotated model and with the cache's bases, if its recipe asks for them."""
    wanted, kv = wanted_rotation(prepared), prepared.recipe.kv_cache
    file = staging / BASES
    if not file.exists():
        by_moments = [kv.basis if kv else "none", *((wanted.stream, wanted.heads) if wanted else ())]
        ordered = wanted is not None and wanted.hidden_order
        moments = gather(prepared, tokens, progress) if "pca" in by_moments or ordered else None
        try:
            bases = rotation_bases(prepared, wanted, moments) if wanted else {}
            bases.update(cache_bases(prepared, moments, folded="heads.0" in bases))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise CompressError(f"bases: {error}") from error
        write_bases(staging, lineage.of(HEAD) if moments else "", bases)
    stored = {name: tensor.read() for name, tensor in read_header(file).items()}
    if kv:
        prepared = replace(prepared, plan=replace(prepared.plan, cache=_saved_cache(prepared, stored)))
    if wanted is None:
        return prepared
    by_block = {
        part: {int(name.split(".")[1]): basis for name, basis in stored.items() if name.startswith(part + ".")}
        for part in ("heads", "hidden")
    }
    skeleton = build_skeleton(prepared.source.path)
    source = RotatedSource(prepared.source, skeleton, Rotation(stored.get("stream"), **by_block))
    norm = final_norm_spec(skeleton, source)
    plan = prepared.plan
    if norm is not None:
        with torch.device("meta"):
            skeleton.set_submodule(norm[0], build(norm[1]))
        plan = replace(plan, others={norm[0]: norm[1]})
    return replace(prepared, source=source, model=skeleton, plan=plan)


def cache_bases(prepared: Prepared, moments: Moments | None, *, folded: bool) -> dict[str, Tensor]:
    """`keys.<block>` and `values.<block>` `[H, D, D]` of the KV cache; no values where v_proj is already in its basis."""
    kv, model = prepared.recipe.kv_cache, prepared.model
    if kv is None or kv.basis == "none":
        return {}
    width, heads = head_width(model), model.config.get_text_config(decoder=True).num_key_value_heads
    high, generator = high_per_head(width, kv.high_share), torch.Generator().manual_seed(_CACHE_SEED)
    bases = {}
    for index in range(prepared.plan.num_blocks):
        sides = {"keys": moments and moments.keys, "values": moments and moments.values}
        for side, of_side in sides.items():
            if side == "values" and folded:
                continue
            bases[f"{side}.{index}"] = (
                hadamard_basis(width).expand(heads, -1, -1).contiguous()
                if kv.basis == "hadamard"
                else torch.stack([pca_basis(moment, high, generator) for moment in of_side[index]])
            )
    return bases


def _saved_cache(prepared: Prepared, bases: dict[str, Tensor]) -> dict[str, Any]:
    kv, model = prepared.recipe.kv_cache, prepared.model
    width = head_width(model)
    options = kv.options.model_dump()
    if kv.high_share:
        options["high_channels"] = high_per_head(width, kv.high_share)
    layers = {
        side: [int(name.split(".")[1]) for name in bases if name.startswith(side + ".")] for side in ("keys", "values")
    }
    heads = model.config.get_text_config(decoder=True).num_key_value_heads
    return {"method": kv.method, "options": options, "bases": layers, "heads": heads, "head_dim": width}


def write_cache_bases(staging: Path) -> list[Path]:
    """The cache's bases in fp32 under the names of the module that holds them in a loaded model."""
    stored = read_header(staging / BASES)
    file = staging / "cache-bases.safetensors"
    tensors = {
        f"{CACHE_MODULE}.{name}": tensor.read().float()
        for name, tensor in stored.items()
        if name.startswith(("keys.", "values."))
    }
    write_file(file, tensors)
    return [file]


def write_rotated(source: Source, names: list[str], staging: Path) -> list[Path]:
    """The rotated tensors that no method packs (embedding, norms), each in a file of its own, in their stored dtype."""
    files = []
    for number, name in enumerate(sorted(names)):
        file = staging / f"rotated-{number:05d}.safetensors"
        write_file(file, {name: source.read(name).to(source.tensors[name].dtype)})
        files.append(file)
    return files
