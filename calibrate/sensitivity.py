"""How much the model's output minds an error in each output neuron of each linear: the diagonal of the Fisher information.

An error e_n(t) in output n of a layer at token t moves the model's distribution by about 1/2 g_n(t)^2 e_n(t)^2 in KL, with
g_n(t) = d log p(y) / d output_n, y drawn from the model's own distribution (one draw per token): the second order of the KL
to the original, so gradients of the first order suffice. In the mean over tokens that is taken apart into

    f_n = E[g_n^2]     and     E[s x x^T] / E[s],   s(t) = sum over n of g_n(t)^2

a number per neuron, and moments of the layer's inputs in which a token counts by how much the output minds it. Without s
tokens that hardly matter but are huge inside (first tokens, separators: "massive activations") decide everything: errors of
Gemma 3's down_proj came out at up to 87 times what they do, with s at .78 to 1.15 times (docs/log.md). What matrices are
fitted to may count tokens by s, too (`calibration.token_weighting`). GuidedQuant (arXiv:2505.07004) has such moments for
groups of output neurons; one s for all outputs keeps one moment and one factorization for linears that share their inputs.

One forward pass keeps every block's inputs on disk; one backward pass goes through the blocks from the last to the first,
each run again with gradients. So memory is one block with its activations, as everywhere, and the logits of a few tokens.

Legend: T tokens, N output neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.calibrate.blocks import BlockRunner, Feeds
from compress.calibrate.statistics import Gram
from compress.errors import CompressError
from compress.tensorfile import read_header, write_file

_LOGITS = 1 << 24  # numbers: bounds tokens x vocabulary of the logits held at once


def tokens_at_once(model: nn.Module) -> int:
    """How many tokens the head takes at once."""
    return max(1, _LOGITS // model.config.get_text_config(decoder=True).vocab_size)


def output_gradients(runner: BlockRunner, batches: int | None = None, seed: int = 0) -> list[Tensor]:
    """Of the log-likelihood of sampled tokens, with respect to the last block's outputs, which `runner.hidden` must hold;
    those of the first `batches` batches, to which all that follows is then limited.

    What lies behind the blocks, the head included, must hold its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = []

    for number, hidden in enumerate(runner.hidden[:batches]):
        samples, length = hidden.shape[:2]
        gradient = torch.zeros_like(hidden)
        for places in torch.arange(length).split(max(1, tokens_at_once(runner.model) // samples)):
            leaf, logits = runner.logits(number, places.to(runner.device))
            flat = logits.flatten(0, -2).float()
            with torch.no_grad():
                sampled = torch.multinomial(flat.softmax(dim=-1).cpu(), 1, generator=generator).to(flat.device)
            loss = torch.nn.functional.cross_entropy(flat, sampled.squeeze(1), reduction="none")
            if runner.mask is not None:
                loss = loss[runner.mask[:, places].flatten().to(loss.device).bool()]
            gradient += torch.autograd.grad(loss.sum(), leaf)[0].cpu()
        gradients.append(gradient)
    return gradients


class Sensitivity(NamedTuple):
    """What the model's output minds of one linear: f `[N]` of its outputs, the moments `[I, I]` of its inputs in which a
    token counts by s, both fp64, and s of every token `[samples, length]` fp32, 1 in the mean over the tokens that count.

    Linears that are fed the same tensor have the same s: the mean of theirs. Moments and s are None where no output matters,
    moments also where nobody asked for them, and s where the linear does not see every token once.
    """

    outputs_N: Tensor
    inputs_II: Tensor | None
    tokens_BL: Tensor | None


def through_block(
    runner: BlockRunner,
    index: int,
    gradients: list[Tensor],
    linears: dict[str, nn.Module],
    moments: Collection[str] = (),
    judging: Collection[int] | None = None,
) -> dict[str, Sensitivity]:
    """One block backwards: the sensitivities of its linears; `gradients` become those of its inputs.

    `runner.hidden` must hold the block's inputs and the block its weights. Moments are gathered for those in `moments`,
    from the batches in `judging`, None for all.

    Raises:
        CompressError: gradients that are not finite, by the linear's name.
    """
    sums: dict[str, Tensor] = {}
    judged: dict[str, Tensor] = {}  # sums of s in the moments
    grams = {name: Gram(linears[name].weight.shape[1], runner.device) for name in moments}
    inputs: dict[str, list[Tensor]] = {name: [] for name in moments}
    gathers = True  # in this batch
    of_tokens: dict[str, list[Tensor]] = {name: [] for name in linears}
    feeds, tokens = Feeds(), 0

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            feeds.leader_of(name, args[0])
            if gathers and name in inputs:
                inputs[name].append(args[0].detach())

        return hook

    def watch(name: str) -> Callable:
        def hook(gradient: Tensor) -> None:
            squares = _counted(gradient, runner.mask).float().square()
            sums[name] = sums.get(name, 0) + squares.flatten(0, -2).sum(dim=0).double()
            of_token = squares.sum(dim=-1)
            of_tokens[name].append(of_token.cpu())
            if gathers and name in inputs:
                grams[name].add(_counted(inputs[name].pop(), runner.mask), weights=of_token)
                judged[name] = judged.get(name, 0) + of_token.double().sum()

        # of the tensor, not of the module: that would make a view of the output, to which Falcon could not add in place
        def watched(module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(hook)

        return watched

    handles = [linear.register_forward_pre_hook(remember(name)) for name, linear in linears.items()]
    handles += [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    places = []
    try:
        for number, gradient in enumerate(gradients):
            feeds.next_batch()
            gathers = judging is None or number in judging
            for left in inputs.values():
                left.clear()  # of a linear whose output got no gradient
            gradients[number] = runner.backward(index, number, gradient)
            places.append(gradient.shape[:-1])
            tokens += gradient.shape[:-1].numel() if runner.mask is None else int(runner.mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    means = _of_tokens(of_tokens, places, feeds.leader, tokens)
    found = {}
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CompressError(f"gradients at the output of {name} are not finite: do without search and token_weighting")
        moments_II = grams[name].mean() * grams[name].tokens / judged[name] if judged.get(name, 0) > 0 else None
        found[name] = Sensitivity(total / tokens, moments_II, means.get(feeds.leader[name]))
    return found


def of_block(gradients: list[Tensor], masks: list[Tensor | None]) -> Tensor | None:
    """s of every token `[samples, length]` at a block's outputs, 1 in the mean over the tokens that count; None where none
    matters."""
    pairs = list(zip(gradients, masks, strict=True))
    whole = torch.cat([_counted(gradient, mask).float().square().sum(dim=-1) for gradient, mask in pairs])
    tokens = sum(gradient.shape[:-1].numel() if mask is None else int(mask.sum()) for gradient, mask in pairs)
    return _one_in_the_mean(whole, tokens) if whole.any() else None


def _one_in_the_mean(of_tokens: Tensor, tokens: int) -> Tensor:
    """Scaled to a mean of one over the `tokens` that count, the others being zero."""
    return of_tokens * (tokens / of_tokens.double().sum()).float()


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero at padded tokens, whatever it is there; a linear that sees other tokens than the block has none."""
    if mask is None or x.shape[:-1].numel() != mask.numel():
        return x
    return x.masked_fill(~mask.reshape(*x.shape[:-1], 1).to(x.device).bool(), 0)


def _of_tokens(
    of_tokens: dict[str, list[Tensor]], places: list[torch.Size], leader: dict[str, str], tokens: int
) -> dict[str, Tensor]:
    """By the first of those that share their inputs, the mean of their s, each 1 in the mean over the tokens that count."""
    pooled: dict[str, list[Tensor]] = {}
    for name, parts in of_tokens.items():
        as_fed = [part.shape in (place, (place.numel(),)) for part, place in zip(parts, places, strict=False)]
        if len(parts) == len(places) and all(as_fed) and any(part.any() for part in parts):
            whole = torch.cat([part.view(place) for part, place in zip(parts, places, strict=True)])
            pooled.setdefault(leader[name], []).append(_one_in_the_mean(whole, tokens))
    return {name: torch.stack(parts).mean(dim=0) for name, parts in pooled.items()}


class StoredStates:
    """The hidden states before every block, in a directory: what one pass over a large model leaves fits no memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, index: int, states: list[Tensor]) -> None:
        write_file(self.folder / f"{index:05d}.safetensors", {f"{i:05d}": state for i, state in enumerate(states)})

    def get(self, index: int) -> list[Tensor]:
        stored = read_header(self.folder / f"{index:05d}.safetensors")
        return [stored[name].read() for name in sorted(stored)]
