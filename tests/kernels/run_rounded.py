"""Run by test_gpu_rounded.py in a process of its own, on the device that its argument names, as run_kernels.py.

Prints one JSON object: for every case the largest error against the reference, relative to the sum of absolute terms, to the
norm of a row, or of codes that must be equal the share that is not. What kernels are given to write to is filled with NaN.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "cpu" else "0"

import torch

from compress.kernels import gpu, gpu_hadamard, gpu_rounded, gpu_rounding
from compress.kernels.column_rounding import round_columns_cuda, round_columns_reference
from compress.kernels.hadamard import gpu_base, hadamard_reference
from compress.kernels.mixed_precision import (
    dequantize_part,
    mixed_precision_cuda,
    mixed_precision_reference,
    rotated,
    rounded_activation,
)
from compress.kernels.pack import pack_signed

torch.set_default_device(sys.argv[1])
torch.manual_seed(0)
warnings.simplefilter("error", UserWarning)  # no case may run the reference
errors: dict[str, float] = {}
empty = torch.empty


def poisoned(*shape: object, **how: object) -> torch.Tensor:
    made = empty(*shape, **how)
    return made.fill_(torch.nan if made.is_floating_point() else 99)


torch.empty = poisoned
torch.empty_like = lambda x, dtype=None: poisoned(x.shape, dtype=dtype or x.dtype, device=x.device)
gpu.usable = lambda x: x.dtype != torch.float64


def share(wrong: torch.Tensor) -> float:
    return float(wrong.double().mean())


def plain(codes: gpu_rounding.Codes, width: int, weight_bits: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and zeros as the reference has them."""
    k, run = torch.arange(width), gpu_rounding.planes(weight_bits)
    seen = codes.codes[:, k % run * codes.plane + k // run].float()
    return (seen + 128, codes.zero.float() + 128) if bits == 8 else (seen, torch.zeros(()))


def compare(
    name: str, got: gpu_rounding.Codes, x: torch.Tensor, slices: int, weight_bits: int, bits: int, clip: float
) -> None:
    codes, scale, zero = rounded_activation(x, bits, slices, clip)
    found, its_zero = plain(got, x.shape[1], weight_bits, bits)
    if bits < 8:
        codes = (codes.unflatten(-1, (slices, -1)) - zero[..., None]).flatten(-2)
    else:
        errors[f"{name} zeros"] = share(its_zero != zero)
    errors[f"{name} codes"] = share(found != codes)
    errors[f"{name} scales"] = float(((got.scale - scale).abs() / scale).max())


def inputs(tokens: int, width: int) -> torch.Tensor:
    """Rows that are zero, negative, positive, with a huge outlier, tiny, and as they come."""
    x = torch.randn(tokens, width) * 10 ** torch.linspace(-1, 1, width)
    kinds = [
        lambda r: 0 * r,
        lambda r: -r.abs() - 1,
        lambda r: r.abs() + 3,
        lambda r: 1e-3 * r,
        lambda r: 1e-4 * r,
        lambda r: r,
    ]
    x = torch.stack([kinds[t % 6](row) for t, row in enumerate(x)])
    x[3::6, width // 2] = 6e4
    return x


for width, slices, tokens in ((13, 1, 6), (168, 3, 6), (gpu_rounding.BLOCK + 8, 1, 4)):
    for bits, weight_bits, clip, dtype in (
        (4, 4, 0.0, torch.float32), (8, 8, 0.0, torch.float16), (6, 6, 0.0, torch.float32), (8, 3, 0.0, torch.float32),
        (4, 2, 2.5, torch.float16), (4, 4, 1e-6, torch.float32),
    ):  # fmt: skip
        x = inputs(tokens, width + 5).to(dtype)[:, 2 : 2 + width]
        got = gpu_rounding.rounded(x, slices, weight_bits, bits, clip)
        compare(
            f"round {width} in {slices} bits {bits} for {weight_bits} clip {clip}", got, x, slices, weight_bits, bits, clip
        )


def packed_part(rows: int, width: int, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, width))
    codes[0], codes[-1] = -half, half - 1
    return pack_signed(codes, bits), torch.randn(rows, -(-width // (group or width))).bfloat16()


def note_product(name: str, x: torch.Tensor, low_bits: int, high_bits: int, high: int, rows: int, *rest: object) -> None:
    """The dispatch as a whole against the reference; x must be such that both see the same codes."""
    group, _, _, _, rotate = rest
    low_width = x.shape[-1] - high
    low = packed_part(rows, low_width, low_bits, group)
    more = packed_part(rows, high, high_bits, group) if high else (None, None)
    arguments = (x, *low, *more, low_bits, high_bits, high, *rest)
    got, want = mixed_precision_cuda(*arguments), mixed_precision_reference(*arguments)
    assert got.shape == want.shape and got.dtype == x.dtype
    seen = rotated(x, high) if rotate else x
    weights = [dequantize_part(*low, low_bits, low_width, group)]
    weights += [dequantize_part(*more, high_bits, high, group)] if high else []
    terms = seen.double().abs() @ torch.cat(weights, dim=1).double().abs().T
    assert not want.isnan().any()
    errors[name] = float(((got.double() - want.double()).abs() / terms.clamp_min(1e-30)).nan_to_num(nan=1.0).max())


# low bits, high bits, high columns, columns, rows, group, activation bits, slices
FORMS = [
    (4, 8, 8, 72, 37, 0, 4, 1), (4, 6, 16, 80, 33, 0, 4, 2), (8, 8, 0, 40, 5, 0, 8, 1), (4, 8, 0, 13, 3, 0, 8, 1),
    (4, 8, 24, 128, 9, 40, 4, 1), (3, 5, 8, 48, 5, 0, 4, 1), (2, 7, 16, 112, 5, 48, 8, 2), (6, 6, 0, 200, 5, 0, 4, 1),
    (4, 8, 24, 600, 9, 144, 4, 1), (8, 8, 0, 640, 5, 0, 8, 1),  # programs share the columns
]  # fmt: skip
for form in FORMS:
    low_bits, high_bits, high, width, rows, group, activation_bits, slices = form
    for tokens in (1, 17):
        note_product(
            f"product {form} tokens {tokens}", inputs(tokens, width), low_bits, high_bits, high, rows, group,
            activation_bits, slices, 0.0, False,
        )  # fmt: skip
for hopper in (False, True):  # around every boundary between tiles
    gpu_rounded.hopper = lambda hopper=hopper: hopper
    for tokens in (16, 32, 33, 64, 65) if hopper else (65,):
        note_product(f"product hopper {hopper} tokens {tokens}", inputs(tokens, 72), 4, 8, 8, 67, 0, 4, 1, 0.0, False)
gpu_rounded.hopper = lambda: False
for extreme in (-1.0, 1.0):  # the largest sums: every code and weight at an end
    x = torch.full((2, 128), extreme)
    note_product(f"product of {extreme}", x, 8, 8, 0, 3, 0, 8, 1, 0.0, False)
note_product("product in three dimensions", inputs(6, 72).view(2, 3, 72), 4, 8, 8, 9, 0, 4, 1, 0.0, False)
note_product("product of fp16", torch.randn(4, 72).half(), 4, 8, 8, 9, 0, 4, 1, 0.0, False)
errors["product of fp16"] /= 2048  # one rounding to 11 bits at the end

processors = gpu_hadamard.processors
for width, block, dtype in (
    (16, 0, torch.float32), (192, 0, torch.float32), (576, 0, torch.float16), (96, 32, torch.float32),
    (1024, 0, torch.float16),
):  # fmt: skip
    x = torch.randn(3, width + 3)[:, 1 : 1 + width].to(dtype)
    base, shape, order = gpu_base(x, width, block)
    slabs = shape._replace(taken=16)
    for name, cut, tokens, many in (("whole", shape, 3, 1), ("slabs", slabs, 3, 1), ("one token", shape, 1, 132)):
        gpu_hadamard.processors = lambda _, many=many: many  # of few, programs do not share a row
        want = hadamard_reference(x[:tokens].float(), block)
        got = gpu_hadamard.transformed(x[:tokens], base, cut, order).float()
        bound = 1.0 if dtype == torch.float32 else 2**13  # fp16 results are rounded once
        errors[f"hadamard {width} {block} {dtype} {name}"] = (
            float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) / bound
        )
gpu_hadamard.processors = processors

# integers, and a factor that is a power of two: every transform is exact, and so must be the codes behind it
for width, bits, weight_bits, dtype in (
    (64, 4, 4, torch.float32), (256, 8, 4, torch.float16), (256, 8, 6, torch.float32), (1024, 6, 8, torch.float32),
    (4096, 4, 4, torch.float32),
):  # fmt: skip
    x = torch.randint(-2000, 2001, (3, width + 8)).to(dtype)[:, :width]
    x[0, 5], x[1] = 30000.0, 0.0
    got = gpu_hadamard.rounded(x, *gpu_base(x, width), weight_bits, bits, 0.0)
    compare(
        f"hadamard and round {dtype} {width} to {bits} for {weight_bits}",
        got,
        hadamard_reference(x),
        1,
        weight_bits,
        bits,
        0.0,
    )
for high, activation_bits, slices in ((0, 4, 1), (32, 4, 1), (8, 8, 1), (32, 4, 2)):
    x = torch.randint(-50, 51, (5, 256 + high)).float()
    note_product(f"rotated {high} {activation_bits} {slices}", x, 4, 8, high, 7, 0, activation_bits, slices, 0.0, True)
for value in (torch.nan, torch.inf, -torch.inf):  # what is not finite spoils its token alone
    for clip, rotate in ((0.0, False), (2.5, False), (0.0, True)):
        x, (low, scale) = torch.randn(3, 64), packed_part(7, 64, 4, 0)
        x[1, 17] = value
        y = mixed_precision_cuda(x, low, scale, None, None, 4, 8, 0, 0, 4, 1, clip, rotate)
        errors[f"{value} clip {clip} rotate {rotate}"] = share(y.isfinite() == torch.tensor([[False], [True], [False]]))
x, parts = torch.randn(2, 1216), [*packed_part(5, 1024, 4, 128), *packed_part(5, 192, 8, 128)]
x[1, 1100] = torch.nan  # of the high part, which some of the programs that share the columns have nothing of
y = mixed_precision_cuda(x, *parts, 4, 8, 192, 128, 4, 1, 0.0, False)
errors["an empty share"] = share(y.isfinite() == torch.tensor([[False], [True]]))

for count, neurons, descent in ((1, 3, False), (13, 9, False), (13, 9, True), (64, 17, False), (100, 8, True)):
    half = torch.tensor([2, 8, 128], dtype=torch.int32).repeat(count)[:count]
    scale = (torch.rand(count, neurons) + 0.5) * torch.randn(count, neurons).sign()
    scale[:, 0] = 0.0  # a neuron of zeros
    inverse = torch.where(scale == 0, 0, 1 / scale) * (torch.rand(count, neurons) < 0.8)  # and codes that a mask holds
    old = torch.randint(-2, 2, (count, neurons)).float() if descent else None
    wide = torch.randn(count + 3, count + 5) / count + torch.eye(count + 3, count + 5)
    for name, matrix in (("upper", wide[:count, :count].triu()), ("transposed", wide[:count, :count].T)):
        given = 4 * torch.randn(count, neurons), matrix, scale, inverse, half, old
        want, got = round_columns_reference(*given), round_columns_cuda(*given)
        case = f"columns {count}x{neurons} {name}{' descent' * descent}"
        errors[f"{case} codes"] = share(got[0] != want[0])
        errors[f"{case} steps"] = float((got[1] - want[1]).norm() / want[1].norm())
given[0][0, 1] = torch.nan
codes, steps = round_columns_cuda(*given)
errors["columns: NaN stays with its neuron"] = share(codes.isnan() != (torch.arange(neurons) == 1))
sys.stdout.write(json.dumps(errors))
