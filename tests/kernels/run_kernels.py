"""Run by test_gpu.py in a process of its own: Triton's interpreter must be chosen before a kernel is defined. The one
argument is the device: cpu, which means the interpreter, or cuda, which means the hardware.

Prints one JSON object: for every case the largest error, relative to the sum of absolute terms.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "cpu" else "0"

import torch

from compress.kernels import gpu, gpu_attention
from compress.kernels.affine_groups import EIGHT_BITS, expand_groups_reference
from compress.kernels.group_attention import group_scores_reference, group_sums_reference
from compress.kernels.mixed_precision import dequantize_part
from compress.kernels.pack import pack, pack_signed
from compress.kernels.sparse_dictionary import pack_mask

torch.set_default_device(sys.argv[1])
torch.manual_seed(0)
errors: dict[str, float] = {}


def note(name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    want, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    errors[name] = float(((got.double() - want).abs() / terms.clamp_min(1e-30)).nan_to_num(nan=1.0).max())


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


for bits in (2, 3, 4, 8):
    for rows, width, group in ((5, 13, 0), (17, 264, 40)):
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (rows, width))
        codes[0], codes[-1] = -half, half - 1
        packed, scale = pack_signed(codes, bits), torch.randn(rows, -(-width // (group or width))).bfloat16()
        weight = dequantize_part(packed, scale, bits, width, group)
        for tokens, dtype in ((1, torch.float32), (2, torch.float16)):
            x = torch.randn(tokens, width + 7).to(dtype)[:, 3 : 3 + width]  # a slice of wider inputs
            name = f"decode {bits} bits {rows}x{width} groups of {group} tokens {tokens}"
            first = gpu.integer_product(x, packed, scale, bits, group, None)
            note(name, first, x, weight)
            if rows > 9:
                continue
            note(f"{name} added", gpu.integer_product(x, packed, scale, bits, group, first.clone()) - first, x, weight)
        out = poisoned(rows, width + 4)
        gpu.expanded(packed, scale, bits, group, out[:, 1 : 1 + width])
        clean = out[:, 0].isnan().all() and out[:, 1 + width :].isnan().all()
        errors[f"expand {bits} bits {rows}x{width} groups of {group}"] = (
            float((out[:, 1 : 1 + width] - weight).abs().max()) if clean else 1.0
        )

for bits in (3, 4, 8, 16):
    for rows, units, learned, nonzeros, group in ((5, 13, 0, 4, 0), (17, 296, 24, 100, 40), (3, 0, 30, 29, 0)):
        atoms = units + learned
        mask = torch.zeros(rows, atoms, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(atoms)[:nonzeros]] = True
        if bits == 16:
            codes, scale, group = torch.randn(rows, atoms).bfloat16() * mask, None, 0
            values, weight = codes[mask].view(rows, -1), codes.float()
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
        for tokens in (1, 2) if rows < 9 else (1,):
            x = torch.randn(tokens, atoms)
            got = gpu.sparse_product(x, values, scale, pack_mask(mask), units, bits, group)
            name = f"sparse {bits} bits {rows}x{units}+{learned} s {nonzeros} groups of {group} tokens {tokens}"
            note(name, got, x, weight)
for bits in (2, 3, 4, 8):
    for rows, per_row, runs, run, kind in (
        (3, 8, 16, 1, EIGHT_BITS),
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
        gpu.expand_groups(*case, out[:, :, 2:-1, 1:-1], units, centre)
        clean = int(out.isnan().sum()) == out.numel() - want.numel()
        errors[f"groups {bits} bits {rows}x{per_row}x{runs}x{run} {kind}"] = (
            float(((out[:, :, 2:-1, 1:-1] - want).abs() / want.abs().clamp_min(1)).nan_to_num(nan=1.0).max())
            if clean
            else 1.0
        )


for bits in (2, 3, 4, 8):
    for rows, tokens, queries, runs, run, kind in (
        (3, 40, 3, 48, 1, EIGHT_BITS), (2, 8, 1, 5, 4, torch.bfloat16), (1, 33, 17, 16, 1, torch.float16)
    ):  # fmt: skip
        width = runs * run
        codes = torch.randint(0, 1 << bits, (2, 3, rows, tokens * width), dtype=torch.uint8)
        packed = torch.full((2, 3, rows + 2, pack(codes, bits).shape[-1]), 255, dtype=torch.uint8)
        packed[:, :, :rows] = pack(codes, bits)
        affine, units = torch.randn(2, 3, rows, 2 * runs).to(kind), None
        if kind == EIGHT_BITS:
            affine, units = affine.view(torch.uint8), torch.rand(2, 3, 2) + 0.5
        case = packed[:, :, :rows], affine, bits, runs
        query, centre = torch.randn(2, 3, queries, width), torch.randn(2, 3, width) if run == 1 else None
        name = f"{bits} bits {rows}x{tokens}x{runs}x{run} {kind}"
        want = group_scores_reference(query, *case, units, centre)
        got = gpu_attention.scores(query, *case, units, centre)
        errors[f"scores {name}"] = float((got - want).abs().max() / want.abs().max())
    for rows, queries, runs, run, kind in ((5, 3, 2, 24, EIGHT_BITS), (601, 1, 1, 32, torch.bfloat16)):
        width = runs * run
        codes = torch.randint(0, 1 << bits, (2, 3, rows, width), dtype=torch.uint8)
        affine, units = torch.randn(2, 3, rows, 2 * runs).to(kind), None
        if kind == EIGHT_BITS:
            affine, units = affine.view(torch.uint8), torch.rand(2, 3, 2) + 0.5
        weights = torch.rand(2, 3, queries, rows)
        case = pack(codes, bits), affine, bits, runs, width, units
        want, got = group_sums_reference(weights, *case), gpu_attention.sums(weights, *case)
        errors[f"sums {bits} bits {rows}x{runs}x{run} {kind}"] = float((got - want).abs().max() / want.abs().max())
sys.stdout.write(json.dumps(errors))
