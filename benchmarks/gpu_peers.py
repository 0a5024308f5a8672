"""Others' kernels for the same linears, in the table of gpu.py: those of torch itself, and of packages that are there.

    torch int4       `_weight_int4pack_mm` ("tinygemm", what torchao's int4 weight-only runs), groups of 128
    torch int8       `_int_mm` of int8 inputs and weights, cuBLAS: the product alone, rounding of the inputs not counted
    bitsandbytes nf4 4-bit floats in blocks of 64, if it is installed

Each holds random codes, is checked against the fp64 product of what it stands for, and is left out, by name, where it cannot
run: an installed package may not know the card, and a kernel may not take the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_GROUP = 128


class Peer(NamedTuple):
    """`run(x)` for inputs `[M, K]`, the fp32 weight `[N, K]` that it multiplies by, and the bytes that it reads of it."""

    run: Callable[[Tensor], Tensor]
    weight: Tensor
    bytes: int


def torch_int4(inputs: int, outputs: int, device: str) -> Peer:
    codes = torch.randint(0, 16, (outputs, inputs), device=device, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    scale = torch.rand(inputs // _GROUP, outputs, device=device).bfloat16() / 100
    both = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()  # code 8 stands for the second of them
    weight = (codes - 8) * scale.float().T.repeat_interleave(_GROUP, dim=1)
    run = torch.ops.aten._weight_int4pack_mm
    return Peer(lambda x: run(x, packed, _GROUP, both), weight, packed.nbytes + both.nbytes)


def torch_int8(inputs: int, outputs: int, device: str) -> Peer:
    codes = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    return Peer(lambda x: torch._int_mm(x, codes.T), codes.float(), codes.nbytes)


def bitsandbytes_nf4(inputs: int, outputs: int, device: str) -> Peer:
    import bitsandbytes as bnb

    dense = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * 0.02
    packed, state = bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    weight = bnb.functional.dequantize_4bit(packed, state).float()
    return Peer(lambda x: bnb.matmul_4bit(x, packed.t(), state), weight, packed.nbytes + state.absmax.nbytes)


PEERS = {"torch int4": torch_int4, "torch int8": torch_int8, "bitsandbytes nf4": bitsandbytes_nf4}


def inputs_of(name: str, batch: int, width: int, device: str) -> Tensor:
    """Random inputs as a peer takes them."""
    if name == "torch int8":
        return torch.randint(-127, 128, (batch, width), device=device, dtype=torch.int8)
    return torch.randn(batch, width, device=device, dtype=torch.bfloat16)


def usable(batch: int, device: str) -> Iterator[tuple[str, str]]:
    """`(name, "")` of every peer that gives the right product for this batch, `(name, why)` of the others."""
    for name, make in PEERS.items():
        try:
            peer, x = make(512, 256, device), inputs_of(name, batch, 512, device)
            want = x.double() @ peer.weight.double().T
            error = float((peer.run(x).double() - want).norm() / want.norm())
            yield name, "" if error < 2e-2 else f"its product is wrong by {error:.3f}"
        except (ImportError, RuntimeError, AttributeError) as failure:
            yield name, f"{type(failure).__name__}: {failure}".splitlines()[0]
