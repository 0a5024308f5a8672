"""A metric for squat without a single token: the queries that q_proj would make of inputs without a direction.

With normalised inputs x of unit covariance, behind the gain g of the norm, queries of one head have the moment

    C = W_q diag(g^2) W_q^T + b b^T            summed over the query heads of a KV head; a layer norm adds to b

and rotary embedding turns it with the position: what keys meet is the mean of R_n C R_n^T over positions n. Fast pairs of
channels come out isotropic; what slow ones have in common stays. A norm of the queries (Qwen3) scales every head to the same
energy and then by its gain.

Where we differ from the published variant (vLLM pull request 44564): the norm's gain, biases and the rotation are counted.
A text says more, because inputs do have directions: prefer `query_moments` or a recipe's `metric: calibration` where there
is one. Cost: one product per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.cache.wave import Turns, turns_of
from compress.model import head_width, kv_heads

_POSITIONS = 4096
_SAMPLES = 256


@torch.no_grad()
def weight_moments(model: nn.Module) -> dict[int, Tensor]:
    """`metrics` for `KVCache(model, "squat", metrics=...)` by layer index, `[kv heads, head_dim, head_dim]` fp32.

    Empty for a model whose queries come from no `q_proj` of their own.
    """
    width, modules = head_width(model), dict(model.named_modules())
    heads, turns, moments = kv_heads(model), turns_of(model, width), {}
    for name, module in modules.items():
        projection = getattr(module, "q_proj", None)
        if projection is None or not hasattr(module, "layer_idx"):
            continue
        weight = projection.dense_weight() if hasattr(projection, "dense_weight") else projection.weight
        weight = weight.double().cpu()
        bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.double().cpu()
        norm = modules.get(f"{name.rpartition('.')[0]}.input_layernorm")
        if getattr(norm, "weight", None) is not None:
            gain, offset = _affine(norm)
            weight, bias = weight * gain, bias + weight @ offset
        rows, bias = weight.unflatten(0, (heads, -1, width)), bias.view(heads, -1, width)
        moment = torch.einsum("hqdi,hqei->hqde", rows, rows) + bias[..., :, None] * bias[..., None, :]
        if getattr(getattr(module, "q_norm", None), "weight", None) is not None and len(module.q_norm.weight) == width:
            gain, _ = _affine(module.q_norm)
            energy = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
            moment = moment / energy * gain[:, None] * gain
        moments[module.layer_idx] = _turned(moment.sum(dim=1), turns).float()
    return moments


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and adds. Gemma's stores the gain less one, and a layer norm takes the mean off: inputs of
    plus and minus one show it."""
    probe = torch.ones(2, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    probe[0, 1::2], probe[1] = -1, 0
    seen, offset = norm(probe).double().cpu()
    return (seen - offset) * probe[0].double().cpu(), offset


def _turned(moment_HDD: Tensor, turns: Turns | None) -> Tensor:
    """The mean of R_n C R_n^T over positions."""
    if turns is None:
        return moment_HDD
    cos, sin = (table[:: _POSITIONS // _SAMPLES].double() for table in turns.up_to(_POSITIONS, torch.device("cpu")))
    width, pairs = moment_HDD.shape[-1], cos.shape[1]
    total = torch.zeros_like(moment_HDD)
    first, second = torch.arange(pairs), torch.arange(pairs, 2 * pairs)
    for turn_cos, turn_sin in zip(cos, sin, strict=True):
        rotation = torch.eye(width, dtype=torch.float64)
        rotation[first, first], rotation[second, second] = turn_cos, turn_cos
        rotation[first, second], rotation[second, first] = -turn_sin, turn_sin
        total += rotation @ moment_HDD @ rotation.T
    return total / len(cos)
