"""Run by test_gpu.py in a process of its own: Triton's interpreter must be chosen before a kernel is defined. The
first argument is the device: cpu, which means the interpreter, or cuda, which means the hardware; others are the widths
to try, all if there are none.

Prints one JSON object: for every case the largest error, relative to the sum of absolute terms.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "cpu" else "0"

import torch

from compress.kernels import gpu, gpu_attention, gpu_group_products, gpu_groups, gpu_products
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups_reference
from compress.kernels.group_attention import attention_reference, group_scores_reference
from compress.kernels.mixed_precision import dequantize_part, mixed_precision_cuda
from compress.kernels.pack import pack, pack_signed
from compress.kernels.sparse_dictionary import pack_mask, sparse_dictionary_cuda

torch.set_default_device(sys.argv[1])
WIDTHS = {int(bits) for bits in sys.argv[2:]} or {2, 3, 4, 5, 6, 7, 8, 16}
torch.manual_seed(0)
HALF = torch.float16 if sys.argv[1] == "cpu" else torch.bfloat16  # the interpreter gets bf16 wrong
errors: dict[str, float] = {}
empty, new_empty = torch.empty, torch.Tensor.new_empty


def note(name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    want, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    errors[name] = float(((got.double() - want).abs() / terms.clamp_min(1e-30)).nan_to_num(nan=1.0).max())


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def poisoned_like(like: torch.Tensor, *shape: int, **how: object) -> torch.Tensor:
    made = new_empty(like, *shape, **how)
    return made.fill_(torch.nan if made.is_floating_point() else 99)


def expand_case(name: str, stored: gpu_products.Weight, weight: torch.Tensor) -> None:
    """Into a slice of a wider matrix, whose margins must stay as they are."""
    out = poisoned(len(weight), stored.columns + 4)
    gpu_products.expanded(stored, out[:, 1:-3])
    clean = out[:, 0].isnan().all() and out[:, -3:].isnan().all()
    errors[f"expand {name}"] = float((out[:, 1:-3] - weight).abs().max()) if clean else 1.0


def product_case(name: str, x: torch.Tensor, *stored: gpu_products.Weight, weight: torch.Tensor) -> None:
    compare(name, gpu_products.product(x, *stored), x, weight)


def compare(name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Results of 16 bits are rounded once at the end, to 11 or 8 of them."""
    note(name, got, x, weight)
    errors[name] /= {torch.float32: 1, torch.float16: 2048, torch.bfloat16: 8192}[x.dtype]


for bits in sorted(WIDTHS - {16}):
    for rows, width, group in ((5, 13, 0), (70, 264, 40), (3, 2077, 64), (3, 300, 256)):
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (rows, width))
        codes[0], codes[-1] = -half, half - 1
        packed, scale = pack_signed(codes, bits), torch.randn(rows, -(-width // (group or width))).bfloat16()
        weight = dequantize_part(packed, scale, bits, width, group)
        stored = gpu_products.Weight(packed, scale, bits, width, group)
        case = f"{bits} bits {rows}x{width} groups of {group}"
        expand_case(case, stored, weight)
        for tokens, dtype in ((1, torch.float32), (1, HALF), (2, HALF), (33, torch.float32)):
            if (tokens > 2 and bits != 4) or (tokens > 1 and bits in (6, 7)):
                continue
            x = torch.randn(tokens, width + 7).to(dtype)[:, 3 : 3 + width]  # a slice of wider inputs
            product_case(f"product {case} tokens {tokens} {dtype}", x, stored, weight=weight)
        if bits in (2, 4, 8) and not group:  # rows that begin at no word
            odd = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:].view_as(packed)
            x = torch.randn(1, width)
            product_case(f"product {case} off words", x, gpu_products.Weight(odd, scale, bits, width, group), weight=weight)
        if group:
            both = torch.cat([weight, weight], dim=1)  # two parts
            product_case(f"product of two parts {case}", torch.randn(2, 2 * width), stored, stored, weight=both)

for bits in sorted(WIDTHS & {3, 4, 8, 16}):
    for rows, units, learned, nonzeros, group in (
        (5, 13, 0, 4, 0), (17, 296, 24, 100, 40), (3, 0, 30, 29, 0), (66, 640, 0, 300, 128), (3, 256, 72, 50, 64),
        (2, 296, 64, 80, 128),
    ):  # fmt: skip
        atoms = units + learned
        mask = torch.zeros(rows, atoms, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(atoms)[:nonzeros]] = True
        if bits == 16:
            codes, scale = torch.randn(rows, atoms).bfloat16() * mask, None
            values, weight = codes[mask].view(rows, -1), codes.float()
            group = 4  # means nothing to values that are not rounded
        else:
            half = 1 << (bits - 1)
            codes = torch.randint(-half, half, (rows, atoms)) * mask
            values = pack_signed(codes[mask].view(rows, -1), bits)
            parts = [part for part in (units, learned) if part]
            counts = [-(-part // (group or part)) for part in parts]
            number = torch.cat([torch.arange(p) // (group or p) + sum(counts[:i]) for i, p in enumerate(parts)])
            scale = torch.randn(rows, sum(counts)).bfloat16()
            weight = codes * scale.float()[:, number]
            if group == 0 and len(parts) > 1:
                continue
        stored = gpu_products.Weight(values, scale, bits, atoms, group, pack_mask(mask), units)
        case = f"sparse {bits} bits {rows}x{units}+{learned} s {nonzeros} groups of {group}"
        expand_case(case, stored, weight)
        for tokens, dtype in ((1, torch.float32), (2, HALF)):
            product_case(f"{case} tokens {tokens}", torch.randn(tokens, atoms).to(dtype), stored, weight=weight)
gpu.usable = lambda x: x.dtype != torch.float64
if 4 in WIDTHS:  # the dispatch as a whole: no tokens, few, many, and inputs that are a view
    low, high = torch.randint(-8, 8, (9, 72)), torch.randint(-32, 32, (9, 16))
    mask = torch.zeros(9, 88, dtype=torch.bool)
    mask[:, ::2] = True
    for tokens in (0, 1, 3, 65):
        for view in (False, True):
            x = torch.randn(88, tokens).T if view else torch.randn(tokens, 88)
            parts = pack_signed(low, 4), torch.rand(9, 1).bfloat16(), pack_signed(high, 6), torch.rand(9, 1).bfloat16()
            weight = torch.cat([low * parts[1].float(), high * parts[3].float()], dim=1)
            got = mixed_precision_cuda(x, *parts, 4, 6, 16, 0, 16, 1, 0.0, False)
            values = torch.randn(9, 44).bfloat16()
            sparse = torch.zeros(9, 88).masked_scatter_(mask, values.float())
            other = sparse_dictionary_cuda(x, values, pack_mask(mask), None, None, None, True, 0, 44, 16, 0, 16)
            assert got.shape == other.shape == (tokens, 9)
            if tokens:
                compare(f"dispatch of {tokens} tokens view {view}", got, x, weight)
                compare(f"sparse dispatch of {tokens} tokens view {view}", other, x, sparse)
for bits in sorted(WIDTHS & {2, 3, 4, 8}):
    for rows, per_row, runs, run, kind in (
        (3, 24, 16, 1, EIGHT_BITS),
        (37, 1, 2, 24, torch.bfloat16),
        (5, 3, 7, 1, torch.float16),
    ):
        channels = runs * run
        codes = torch.randint(0, 1 << bits, (2, 3, rows, per_row * channels), dtype=torch.uint8)
        packed = torch.full((2, 3, rows + 2, pack(codes, bits).shape[-1]), 255, dtype=torch.uint8)  # rows of a larger buffer
        packed[:, :, :rows] = pack(codes, bits)
        affine, units = torch.randn(2, 3, rows, 2 * runs).to(kind), None
        if kind == EIGHT_BITS:
            affine[0, 0, 0, :4] = torch.tensor([0.0, 2**-9, -(2**-7), 448.0]).to(kind)  # subnormal, and the end
            affine, units = affine.view(torch.uint8), torch.rand(2, 3, 2) + 0.5
        centre = torch.randn(2, 3, channels) if run == 1 else None
        want, out = torch.empty(2, 3, rows * per_row, channels), poisoned(2, 3, rows * per_row + 3, channels + 2)
        case = (packed[:, :, :rows], affine, bits, runs)
        expand_groups_reference(*case, want, units, centre)
        gpu_groups.expand_groups(*case, out[:, :, 2:-1, 1:-1], units, centre)
        clean = int(out.isnan().sum()) == out.numel() - want.numel()
        errors[f"groups {bits} bits {rows}x{per_row}x{runs}x{run} {kind}"] = (
            float(((out[:, :, 2:-1, 1:-1] - want).abs() / want.abs().clamp_min(1)).nan_to_num(nan=1.0).max())
            if clean
            else 1.0
        )


def stored(rows: int, tokens: int, bits: int, runs: int, run: int, kind: torch.dtype) -> tuple:
    """Packed rows of a larger buffer, as attention takes them, but for the centre; units are what 1.0 stands for."""
    codes = torch.randint(0, 1 << bits, (2, 3, rows, tokens * runs * run), dtype=torch.uint8)
    packed = torch.full((2, 3, rows + 2, pack(codes, bits).shape[-1]), 255, dtype=torch.uint8)
    packed[:, :, :rows] = pack(codes, bits)
    affine, units = (torch.randn(2, 3, rows, 2 * runs) / (1 << (bits - 2))).to(kind), None
    if kind == EIGHT_BITS:
        affine, units = affine.view(torch.uint8), torch.rand(2, 3, 2) + 0.5
    return packed[:, :, :rows], affine, bits, runs, units


def part_of(*shape: int) -> torch.Tensor:
    """Random rows of a larger buffer."""
    return torch.randn(2, 3, shape[0] + 5, shape[1])[:, :, : shape[0]]


for bits in sorted(WIDTHS & {2, 3, 4, 8}):
    for rows, tokens, queries, runs, run, kind in (
        (3, 40, 3, 48, 1, EIGHT_BITS), (2, 8, 1, 6, 4, torch.bfloat16), (1, 33, 16, 16, 1, torch.float16),
        (2, 150, 9, 16, 1, EIGHT_BITS),
    ):  # fmt: skip
        width = runs * run
        *case, units = stored(rows, tokens, bits, runs, run, kind)
        query, centre = torch.randn(2, 3, queries, width), torch.randn(2, 3, width) if run == 1 else None
        want = group_scores_reference(0.5 * query, *case, units, centre)
        torch.empty = lambda *shape, **_: poisoned(*shape)
        got = gpu_group_products.scores(query, 0.5, *case, units, centre)
        torch.empty = empty
        name = f"{bits} bits {rows}x{tokens}x{runs}x{run} {kind}"
        errors[f"scores {name}"] = float(((got - want).abs().max() / want.abs().max()).nan_to_num(nan=1.0))
    gpu_group_products.PROGRAMS = 15  # several parts, of several tiles,
    gpu_attention.TOGETHER = 2  # put together in several steps
    # groups of packed tokens, tokens of each, exact ones, queries, new ones; channels of keys, runs of values, channels
    for groups, tokens, exact, queries, new, width, runs, run, kind in (
        (1, 5, 7, 3, 1, 48, 2, 24, EIGHT_BITS), (15, 40, 70, 2, 2, 16, 2, 32, torch.bfloat16),
        (2, 35, 1, 1, 1, 8, 1, 48, EIGHT_BITS), (1, 130, 65, 21, 7, 64, 4, 32, EIGHT_BITS),
        (1, 65, 3, 4, 1, 16, 16, 8, torch.float16),
    ):  # fmt: skip
        *keys, key_units = stored(groups, tokens, bits, width, 1, kind)
        *values, value_units = stored(groups * tokens, 1, bits, runs, run, kind)
        keys, values = (*keys, key_units, torch.randn(2, 3, width)), (*values, runs * run, value_units)
        query, exact = torch.randn(2, 3, queries, width), (part_of(exact, width), part_of(exact, runs * run))
        for dtype in (torch.float32, HALF):
            case = query.to(dtype), tuple(states.to(dtype) for states in exact), keys, values, new, 0.3
            want = attention_reference(case[0].float(), *case[1:])
            torch.empty = lambda *shape, **_: poisoned(*shape)
            torch.Tensor.new_empty = poisoned_like
            got = gpu_attention.attention(*case)
            torch.empty, torch.Tensor.new_empty = empty, new_empty
            assert got.dtype == dtype
            name = f"attention {bits} bits {groups}x{tokens}x{runs}x{run} {kind} {queries} queries {dtype}"
            errors[name] = float(((got - want).abs().max() / want.abs().max()).nan_to_num(nan=1.0))
            errors[name] /= {torch.float32: 1, torch.float16: 1024, torch.bfloat16: 8192}[dtype]
sys.stdout.write(json.dumps(errors))
