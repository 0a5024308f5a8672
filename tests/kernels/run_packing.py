"""Run by test_gpu.py in a process of its own, as run_kernels.py: the kernel that packs groups, against its reference.

Prints one JSON object: for every case how many bytes of codes and scales differ, out of how many, how much more the kernel
is off by than the reference, and whether no sum decides anything, so that none may differ. New tensors are filled with NaN
or a strange byte and lie between margins that must stay as they are.
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "cpu" else "0"

import torch
import triton
import triton.language as tl

from compress.kernels import gpu_packing
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups_reference
from compress.kernels.group_packing import behind, pack_groups_reference
from compress.kernels.rounding import Grid, as_bytes, to_grid

torch.set_default_device(sys.argv[1])
torch.manual_seed(0)
results: dict[str, dict[str, float]] = {}
margins: list[torch.Tensor] = []
KINDS = (EIGHT_BITS, torch.bfloat16, torch.float16)
MARGIN = 64
new_empty = torch.Tensor.new_empty


def guarded(self: torch.Tensor, *shape: int, dtype: torch.dtype | None = None, **of_interpreter: object) -> torch.Tensor:
    """What `Tensor.new_empty` gives the kernel."""
    if dtype is None:
        return new_empty(self, *shape, **of_interpreter)
    fill = torch.nan if dtype.is_floating_point else 0xA5
    whole = torch.full((math.prod(shape) + 2 * MARGIN,), fill, dtype=dtype)
    margins.extend((whole[:MARGIN], whole[-MARGIN:]))
    return whole[MARGIN:-MARGIN].view(shape)


def keys(heads: int, tokens: int, width: int) -> torch.Tensor:
    """Channels of unequal scale and offset, in a buffer with room."""
    x = torch.randn(1, heads, tokens + 3, width) * torch.rand(heads, 1, width) * 3 + torch.randn(heads, 1, width)
    return x[:, :, 2:-1]


def units(heads: int, kind: torch.dtype) -> torch.Tensor | None:
    return torch.rand(1, heads, 2) * 0.2 + 0.05 if kind == EIGHT_BITS else None


def compensation(batch: int, heads: int, width: int, block: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    count = sum(size * block for size in behind(width, block))
    return torch.rand(batch, heads, width).argsort(dim=-1), 0.3 * torch.randn(batch, heads, count), block


def read(found: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, given: tuple) -> torch.Tensor:
    out = torch.empty(x.shape)
    expand_groups_reference(*found, given[0], given[2], out, *given[4:6])
    return out


def case(name: str, x: torch.Tensor, *given: object) -> None:
    """`given` as `pack_groups` takes it behind the states, whole."""
    given = (*given, *(None, None, None, None, 0, 0)[len(given) - 4 :])
    want = pack_groups_reference(x, *given)
    torch.Tensor.new_empty = guarded
    got = gpu_packing.packed(x, *given)
    torch.Tensor.new_empty = new_empty
    whole = all(margin.isnan().all() if margin.is_floating_point() else (margin == 0xA5).all() for margin in margins)
    margins.clear()
    wanted, found = read(want, x, given), read(got, x, given)
    whole &= [tensor.dtype for tensor in got] == [tensor.dtype for tensor in want]
    whole &= torch.equal(wanted.isnan(), found.isnan())
    known = wanted.isfinite() & x.isfinite()
    off = [float((states - x.float())[known].double().norm()) for states in (found, wanted)]
    differ, total = 0, 0
    for a, b in zip(got, want, strict=True):
        differ, total = differ + int((a.view(torch.uint8) != b.view(torch.uint8)).sum()), total + b.nbytes
    if wanted.isnan().any():  # whose bytes are whatever a NaN is cast to
        differ = int((found[known] != wanted[known]).sum())
    ratio = off[0] / off[1] if off[1] else 1 + off[0]
    exact = given[3] != EIGHT_BITS and given[6] is None and not given[9]
    results[name] = {"differ": differ, "bytes": total, "ratio": ratio if whole else math.inf, "exact": exact}


for bits in range(2, 9):
    for kind in KINDS:
        case(f"keys {bits} bits {kind}", keys(2, 16, 5), bits, 16, 5, kind, units(2, kind), torch.randn(1, 2, 5))
        case(f"values {bits} bits {kind}", keys(1, 2, 48), bits, 1, 2, kind, units(1, kind))
    kind = KINDS[bits % 3]
    moved = compensation(1, 1, 16, 8)
    case(f"compensated {bits} bits {kind}", keys(1, 16, 16), bits, 16, 16, kind, units(1, kind), None, *moved, 2)

for kind, dtype in zip(KINDS, (torch.bfloat16, torch.float16, torch.float32), strict=True):
    case(f"searched {kind} of {dtype}", keys(2, 8, 20).to(dtype), 3, 8, 20, kind, units(2, kind), torch.randn(1, 2, 20),
         None, None, 0, 3)  # fmt: skip
    batch = keys(4, 24, 12).view(2, 2, 24, 12)
    pair = None if kind != EIGHT_BITS else units(4, kind).view(2, 2, 2)
    for shared in (1, 2):
        moved = compensation(shared, 2, 12, 4)
        case(f"two rows, {shared} metrics, {kind}", batch, 2, 24, 12, kind, pair, None, *moved, 0)
    for width in (1, 7, 20):
        case(f"one run of {width} {kind}", keys(1, 2, width), 5, 1, 1, kind, units(1, kind))
    case(f"run of many tokens {kind}", keys(1, 16, 6), 4, 8, 3, kind, units(1, kind))

for tokens, block in ((64, 8), (8, 20)):  # a block may be more than a program takes at once
    centre, moved = torch.randn(1, 1, 40), compensation(1, 1, 40, block)
    case(f"blocks of {block}", keys(1, tokens, 40), 3, tokens, 40, EIGHT_BITS, units(1, EIGHT_BITS), centre, *moved, 5)

odd = torch.zeros(1, 1, 16, 12)
odd[..., 1], odd[..., 2] = -3.5, 100.1  # constant channels
odd[..., 3] = torch.linspace(-1e4, 1e4, 16)  # beyond the end of eight bits
odd[..., 4], odd[..., 5] = 1e-30 * torch.randn(16), 1e30 * torch.randn(16)
odd[..., 6], odd[..., 7] = torch.randn(16), -torch.rand(16) * 1e-3
odd[0, 0, 3, 6] = 5e4  # one outlier
odd[..., 8], odd[..., 9] = 2.0**-9 * torch.arange(16), 70000.0 + torch.arange(16)  # subnormal steps; past fp16
odd[..., 10] = -0.0
for kind in KINDS:
    pair = None if kind != EIGHT_BITS else torch.tensor([[[1.0, 0.3]]])
    for fit in (0, 3):
        case(f"odd numbers {kind} fit {fit}", odd, 2, 16, 12, kind, pair, None, None, None, 0, fit)
    strange = keys(1, 16, 12)
    strange[0, 0, 3, 5], strange[0, 0, 10, 7] = torch.nan, torch.inf
    for name, moved in (("plain", (None, None, 0)), ("compensated", compensation(1, 1, 12, 4))):
        for fit in (0, 1):
            case(f"NaN and infinity {name} {kind} fit {fit}", strange, 3, 16, 12, kind, pair, None, *moved, fit)


@triton.jit
def to_grid_bits(
    x, out, OUTWARD: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, COUNT)
    rounded = gpu_packing._to_grid(tl.load(x + at), OUTWARD, MANTISSA, SMALLEST, LARGEST)
    tl.store(out + at, gpu_packing._stored(rounded, MANTISSA, SMALLEST))


for kind in KINDS:
    step = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    whole = torch.arange(1024) * step / 2  # subnormal and small numbers, and ties between them
    wide = torch.randn(1024) * 2.0 ** torch.randint(-12, 20, (1024,))
    ties = (wide.view(torch.int32) & ~0xFFFFF | 0x80000).view(torch.float32)  # of e4m3; and of the others
    ties = torch.cat([ties, (wide.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)])
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(kind).max, 3e38, -1e-40, 1e-45])
    x = torch.cat([whole, -whole, wide, wide.to(kind).float(), ties, ends, torch.zeros(2040)])
    shape = gpu_packing.constants(16, 1, 0, kind)
    for outward in (-1, 0, 1):
        want = as_bytes(to_grid(x, Grid(kind), outward=outward))
        got = torch.empty(x.shape, dtype=torch.uint8 if kind == EIGHT_BITS else torch.int16)
        to_grid_bits[(1,)](x, got, outward, shape["MANTISSA"], shape["SMALLEST"], shape["LARGEST"], len(x))
        differ = int((got.view(torch.uint8) != want.view(torch.uint8)).sum())
        results[f"grid {kind} {outward}"] = {"differ": differ, "bytes": got.nbytes, "ratio": 1.0, "exact": True}
sys.stdout.write(json.dumps(results))
