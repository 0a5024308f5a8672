"""Refinement: what a block's packed layers hold in floating point, fitted together to what the block should answer.

Solvers fit one matrix at a time, to its own outputs. Here supports and integer codes stay as they are, and nonzeros, atoms,
factors and scales move down the gradient of the block's squared output error on the calibration tokens: errors of several
matrices that cancel, or that nothing behind them minds, are worth nothing to it.

Sources: block reconstruction of BRECQ (arXiv:2102.05426), for pruned weights EBFT (arXiv:2402.12419) and the
transformer matching of 3BASiL. Where we differ: any format whose `dense_weight` is differentiable, and targets that follow
`calibration.inputs`: what the original block answers to the inputs that come from compressed predecessors or, paired,
`paired_share` of the way from there to what the original model gives at this place. With `calibration.token_weighting` a
token counts by the model's gradients at the block's outputs.
Adam with a rate relative to the root mean square of each tensor, falling to zero; masters in fp32, one cast back. A block
whose error did not fall, measured with the tensors as they are stored, keeps what the solvers gave.
Cost: the time of three forward passes per epoch and of three for target and errors, and with learned atoms a product that
multiplies the weight out for every step; memory: five fp32 copies of a block's packed floats, its weights in fp32, two more
sets of hidden states, and the activations of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from compress.calibrate.blocks import BlockRunner
from compress.errors import CompressError
from compress.layers import CompressedLinear
from compress.recipe import Refine

_STEP_TOKENS = 1024
_BETAS = (0.9, 0.95)
_WARM_UP = 0.1  # of all steps

Layers = dict[str, CompressedLinear]
Step = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # inputs, targets, mask and weights of the tokens


@dataclass(frozen=True)
class Refined:
    """A block's output error relative to what the block adds to its inputs, before and after; whether it fell."""

    before: float
    after: float
    better: bool


def refine_block(
    runner: BlockRunner, index: int, layers: Layers, options: Refine, seed: int, weights_BL: Tensor | None = None
) -> Refined:
    """Fit the floating-point tensors of `layers`, which are to replace linears of block `index`, in place.

    Args:
        runner: holds the block's inputs in `hidden` and, where there is a second stream, the original block's outputs in
            `reference`.
        layers: by the linear's name; the block still holds its original weights.
        seed: of the order in which sequences are seen.
        weights_BL: `[samples, length]`, how many times each token counts; None: all alike.
    Returns:
        The errors; where they did not fall the layers hold what they held.
    """
    targets = runner.outputs(index)
    if runner.reference is not None:
        targets = [own.lerp(theirs, runner.share) for own, theirs in zip(targets, runner.reference, strict=True)]
    sizes = [len(target) for target in targets]
    weights = [None] * len(sizes) if weights_BL is None else list(weights_BL.split(sizes))
    added = _squares(runner, runner.hidden, targets, weights) or 1.0  # a block may add nothing
    stored = {name: {key: p.detach().clone() for key, p in _movable(layer)} for name, layer in layers.items()}
    with _in_place_of_linears(runner.model, layers):
        before = _squares(runner, runner.outputs(index), targets, weights)
        _replace(layers, lambda name, key, p: p.detach().float().requires_grad_())
        _descend(runner, index, layers, list(_steps(runner, targets, weights)), options, seed)
        _replace(layers, lambda name, key, p: p.detach().to(stored[name][key].dtype))
        try:
            after = _squares(runner, runner.outputs(index), targets, weights)
        except CompressError:  # it diverged
            after = inf
    if not after < before:
        _replace(layers, lambda name, key, p: stored[name][key])
    return Refined((before / added) ** 0.5, (after / added) ** 0.5, after < before)


def _descend(runner: BlockRunner, index: int, layers: Layers, steps: list[Step], options: Refine, seed: int) -> None:
    """Adam on the fp32 masters that `layers` hold, about a thousand tokens a step."""
    masters = [p for layer in layers.values() for _, p in _movable(layer)]
    groups = [{"params": [p], "lr": options.rate * float(p.detach().square().mean().sqrt())} for p in masters]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    total = options.epochs * len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (_WARM_UP * total)) * (1 - step / total)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        for at in torch.randperm(len(steps), generator=generator).tolist():
            state, target, mask, weight = steps[at]
            output = runner.tracked(index, state.to(runner.device).clone(), mask)  # a clone: inference made the states
            error = _errors(output - target.to(runner.device), mask, weight)
            if not error.requires_grad:  # none of the experts that move was asked
                continue
            gradients = torch.autograd.grad(error.mean(), masters, allow_unused=True)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            optimizer.step()
            schedule.step()


def _steps(runner: BlockRunner, targets: list[Tensor], weights: list[Tensor | None]) -> Iterator[Step]:
    """A few sequences each: batches made for forward passes are too large to step by."""
    for state, target, (_, mask), weight in zip(runner.hidden, targets, runner.batches, weights, strict=True):
        rows = max(1, _STEP_TOKENS // state.shape[1])
        for at in range(0, len(state), rows):
            part = slice(at, at + rows)
            yield state[part], target[part], *(None if each is None else each[part] for each in (mask, weight))


def _squares(runner: BlockRunner, states: list[Tensor], targets: list[Tensor], weights: list[Tensor | None]) -> float:
    """Sum of the squared differences, each token as often as it counts, fp64; padding left out."""
    batches = zip(states, targets, runner.batches, weights, strict=True)
    return sum(float(_errors((state - target).double(), mask, weight).sum()) for state, target, (_, mask), weight in batches)


def _errors(difference: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """The squared error of every token but padding, times its weight; in fp32 at least."""
    if mask is not None:  # first: what is not finite at padding would reach the gradients through the square
        counted = mask.to(difference.device).bool()
        difference, weight = difference[counted], None if weight is None else weight.to(difference.device)[counted]
    squares = difference.to(torch.promote_types(difference.dtype, torch.float32)).square().sum(dim=-1)
    return squares if weight is None else squares * weight.to(squares.device)


def _movable(layer: CompressedLinear) -> Iterator[tuple[str, nn.Parameter]]:
    """The floating-point tensors that stand for the weight; the bias is the original's."""
    return ((key, p) for key, p in layer.named_parameters(recurse=False) if key != "bias")


def _replace(layers: Layers, new: Callable[[str, str, nn.Parameter], Tensor]) -> None:
    """Give each movable tensor of the layers another, `new(layer, tensor, old)`."""
    for name, layer in layers.items():
        for key, p in list(_movable(layer)):
            tensor = new(name, key, p)
            layer.register_parameter(key, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))


class _Multiplied(nn.Module):
    """A packed layer for many tokens and gradients: the product with its dense weight, behind the rounding of the inputs,
    if any, through which gradients pass unchanged."""

    def __init__(self, layer: CompressedLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.rounding(layer.spec):
            with torch.no_grad():
                off = layer.seen_input(layer.spec, x) - x
            x = x + off
        return nn.functional.linear(x, layer.dense_weight().to(x.dtype), self.bias)


@contextmanager
def _in_place_of_linears(model: nn.Module, layers: Layers) -> Iterator[None]:
    linears = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, _Multiplied(layer, linears[name].bias))
    try:
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
