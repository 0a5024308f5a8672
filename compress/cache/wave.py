"""What a key bias becomes behind rotary embedding, so that it need not be rounded.

Qwen2's k_proj has biases hundreds of times larger than what varies (llama.cpp's discussion 21385 has |b| of 600 and 900 in
the first and last layer of the 7B). In channels that rotary embedding turns slowly a bias is a constant, which the centre of
a group takes up; in fast ones it is a wave of that size, and a few bits of it drown the rest. But the wave is known:

    key at position n  =  R_n (W x + b)  =  R_n W x  +  R_n b

so R_n b is taken off before keys are rounded and added when they are read. Both use the place in the row as n, so what is
read is right whatever the model's positions are; where they are others, or the layout of the rotation is, the wave does not
match, the first group of a row shows it, and the row goes without.

Cost: cosines for the tokens so far, shared by all layers, and four products per element of a read, for models with key
biases only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Turns:
    """Cosines and sines of the positions so far, `[tokens, pairs]` fp32; one table for all layers of a model."""

    def __init__(self, inv_freq: Tensor, scaling: float) -> None:
        self.inv_freq, self.scaling = inv_freq.detach().double().cpu(), scaling
        self.cos = self.sin = torch.empty(0, len(inv_freq), device="cpu")

    def up_to(self, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if stop > len(self.cos) or self.cos.device != device:
            angles = torch.arange(2 * stop, dtype=torch.float64, device="cpu")[:, None] * self.inv_freq
            self.cos, self.sin = ((f(angles) * self.scaling).float().to(device) for f in (torch.cos, torch.sin))
        return self.cos[:stop], self.sin[:stop]


class Wave:
    """R_n b of one layer."""

    def __init__(self, bias_HD: Tensor, turns: Turns) -> None:
        self.bias, self.turns = bias_HD.detach().float().clone(), turns

    def at(self, start: int, stop: int, device: torch.device) -> Tensor:
        """`[heads, stop - start, head_dim]` fp32 for the tokens from `start` on, channel i paired with i + pairs."""
        cos, sin = (table[start:] for table in self.turns.up_to(stop, device))
        bias, pairs = self.bias.to(device), cos.shape[1]
        first, second = bias[:, None, :pairs], bias[:, None, pairs : 2 * pairs]
        rest = bias[:, None, 2 * pairs :].expand(-1, stop - start, -1)  # partial rotary embedding
        return torch.cat([cos * first - sin * second, cos * second + sin * first, rest], dim=-1)


def turns_of(model: nn.Module, head_dim: int) -> Turns | None:
    """The turns of a plain rotary embedding; None for a model that has none, or one for every kind of layer."""
    rotary = next((module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    inv_freq = getattr(rotary, "inv_freq", None)
    if not isinstance(inv_freq, Tensor) or inv_freq.is_meta or 2 * len(inv_freq) > head_dim:
        return None
    return Turns(inv_freq, float(getattr(rotary, "attention_scaling", 1.0)))


def waves_of(model: nn.Module, head_dim: int) -> dict[int, Wave]:
    """By layer index, for the attention modules whose keys have a bias and are turned by a plain rotary embedding."""
    turns, waves = turns_of(model, head_dim), {}
    if turns is None:
        return waves
    for module in model.modules():
        bias = getattr(getattr(module, "k_proj", None), "bias", None)
        if bias is not None and not bias.is_meta and hasattr(module, "layer_idx") and bias.numel() % head_dim == 0:
            waves[module.layer_idx] = Wave(bias.view(-1, head_dim), turns)
    return waves
