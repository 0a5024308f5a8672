"""Compile every Triton kernel for GPUs that are not here, and read what the compilers made of it.

    python -P benchmarks/compiled_kernels.py             # what `make kernels` runs: sm_80, sm_90, gfx942
    python -P benchmarks/compiled_kernels.py --quick     # one width per kernel for sm_90: part of `make test`

One JSON line per kernel, width and target: registers, spills, shared memory, matrix instructions, and the instructions that
the main loop issues for each weight it handles. A spill, more registers than let two blocks share a processor, codes that do
not meet integer tensor cores, or a loop that has grown past its budget by a tenth ends with status 1. Nothing is run: these
are static counts, no times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # @triton.jit would return functions that cannot be compiled
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import (
    gpu,
    gpu_attention,
    gpu_decode,
    gpu_group_products,
    gpu_groups,
    gpu_hadamard,
    gpu_packing,
    gpu_products,
    gpu_rounded,
    gpu_rounding,
)  # fmt: skip
from compress.kernels.affine_groups import EIGHT_BITS
from compress.kernels.column_rounding import ROWS, settle_columns

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x": "*bf16",
    "packed": "*u8",
    "scale": "*bf16",
    "y": "*fp32",
    "out": "*bf16",
    "mask": "*u8",
    "unit_pairs": "*fp32",
    "centre": "*fp32",
    "query": "*bf16",
    "scores": "*fp32",
    "sums": "*fp32",
    "totals": "*fp32",
    "tops": "*fp32",
    "keys": "*bf16",
    "scaling": "fp32",
    "states": "*bf16",
    "order": "*i64",
    "moves": "*fp32",
    "errors": "*fp32",
    "codes": "*u8",
}
# where a name stands for something else
TYPES = {
    "round_slices": {"codes": "*i8", "scale": "*fp32", "zero": "*i32", "count": "fp32", "top": "fp32", "clip": "fp32"},
    "settle_columns": {
        **dict.fromkeys(("state", "matrix", "scale", "inverse", "old", "codes", "steps"), "*fp32"), "half": "*i32",
    },
    "transform": {
        "base": "*i8", "scale": "*fp32", "zero": "*i32", "factor": "fp32", "count": "fp32", "top": "fp32", "clip": "fp32",
    },
    "rounded_product": {
        "y": "*bf16",
        **{f"{part}{name}": kind for part in ("low", "high") for name, kind in (
            ("", "*u8"), ("_scale", "*bf16"), ("_codes", "*i8"), ("_x_scale", "*fp32"), ("_x_zero", "*i32"),
        )},
    },
}  # fmt: skip
# multiples of 16, which a launch finds out by itself
ALIGNED = {
    "packed_product": ("N", "K", "row_values", "mask_bytes", "group_size", "x_stride"),
    "decode_product": ("N", "K", "x_stride", "words"),
    "packed_expand": ("N", "K", "row_values", "mask_bytes", "group_size", "out_stride"),
    "transform": ("x_stride", "y_stride", "plane"),
    "rounded_product": ("low_bytes", "high_bytes"),
    "group_scores": ("packed_outer", "packed_row", "affine_outer", "affine_row", "scores_outer"),
    "group_sums": ("packed_outer", "packed_row", "affine_outer", "rows"),
    "group_finish": ("keys_outer", "keys_row", "values_outer", "values_row"),
}
REGISTERS = {"gfx942": 260}  # four too many for two blocks, for keys of 256 channels and queries in fp32
INTEGER = re.compile(r"IG?MMA|v_mfma_i32")
ATTENTION = {"EIGHT_BITS": True, "KIND": tl.bfloat16}
# numbers of a group, runs, block, dtype of scales, ranges tried: the defaults of squat, values and kivi; then the largest
PACKING = [
    (64, 128, 8, EIGHT_BITS, 5), (32, 4, 0, EIGHT_BITS, 0), (64, 128, 0, EIGHT_BITS, 5), (64, 128, 8, torch.bfloat16, 5),
    (64, 128, 0, torch.bfloat16, 0), (64, 128, 0, torch.float16, 0), (128, 128, 64, EIGHT_BITS, 5),
    (8, 128, 64, EIGHT_BITS, 5), (1024, 16, 0, EIGHT_BITS, 5),
]  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")  # of a launch of group_pack, among its constants
UNFUSED = {"enable_fp_fusion": False}  # of launches that round as the reference does
TILE = {"ROWS": gpu_groups.ROWS, "EIGHTS": gpu_groups.EIGHTS}
ALONE = {"num_warps": 1} | UNFUSED
# instructions per weight of the loop on sm_90, as first measured with triton 3.9.0
BUDGET = {
    "packed_product 2": 5.5, "packed_product 3": 7.7, "packed_product 4": 5.3, "packed_product 5": 9.9,
    "packed_product 6": 10.2, "packed_product 7": 11.3, "packed_product 8": 6.9, "packed_product sparse 3": 30.0,
    "packed_product sparse 4": 27.1, "packed_product sparse 8": 20.1, "packed_product sparse 16": 13.1,
    "decode_product 2": 6.1, "decode_product 3": 7.9, "decode_product 4": 6.2, "decode_product 5": 9.0,
    "decode_product 6": 9.7, "decode_product 7": 11.4, "decode_product 8": 6.3, "decode_product sparse 3": 34.5,
    "decode_product sparse 4": 28.9, "decode_product sparse 8": 22.5, "decode_product sparse 16": 17.4,
    "rounded_product 4 tokens 16": 5.0, "rounded_product 4 tokens 128": 5.8, "rounded_product 6 tokens 16": 13.3,
    "rounded_product 6 tokens 128": 14.6, "rounded_product 8 tokens 16": 3.1, "rounded_product 8 tokens 128": 4.2,
}  # fmt: skip


Case = tuple[str, object, dict, dict]  # name, kernel, compile-time constants, options of the launch


def cases(quick: bool, target: str) -> list[Case]:
    """What is shipped."""
    hopper = target == "sm_90"
    packed = [(*case, {"num_warps": gpu.WARPS}) for case in packed_cases(quick, hopper)]
    columns = [
        (f"settle_columns{' descent' * descent}", settle_columns, {"DESCENT": descent, "ROWS": ROWS, "BLOCK": 128}, ALONE)
        for descent in (False, True)
    ]
    packed += columns + decode_cases(quick) + packing_cases(quick)
    return packed + rounded_cases(quick, hopper) + hadamard_cases(quick, hopper)


def packing_cases(quick: bool) -> list[Case]:
    """The default of squat at every width, the other groups at 4 bits."""
    found = [_packing(bits, *PACKING[0]) for bits in ([4] if quick else range(2, 9))]
    return found + [_packing(4, *shape) for shape in (PACKING[1:2] if quick else PACKING[1:])]


def _packing(bits: int, numbers: int, runs: int, block: int, dtype: torch.dtype, fit: int) -> Case:
    constants = gpu_packing.constants(numbers, runs, block, dtype) | {
        "BITS": bits, "FIT": fit, "UNITS": dtype == EIGHT_BITS, "CENTRE": numbers > 32, "PRECISION": "tf32x3"
    }  # fmt: skip
    grid = str(dtype).removeprefix("torch.")
    name = f"group_pack {bits}: {numbers} numbers, {runs} runs, block {block}, {grid}, fit {fit}"
    options = {key: constants.pop(key) for key in OPTIONS}
    return name, gpu_packing.group_pack, constants, options


def rounded_cases(quick: bool, hopper: bool) -> list[Case]:
    """Rounding, and products of one part and of two, of 3584 and 512 columns with one scale each."""
    found = []
    for bits, centred in [(4, False)] if quick else [(4, False), (6, False), (8, True)]:
        constants = {"CENTRED": centred, "PLANES": gpu_rounding.planes(bits), "BLOCK": gpu_rounding.BLOCK}
        found.append(
            (f"round_slices {bits}", gpu_rounding.round_slices, constants, {"num_warps": gpu_rounding.WARPS} | UNFUSED)
        )
    for stored in [(4, 8)] if quick else [(4,), (6,), (8,), (4, 8), (4, 6), (8, 8), (3, 5), (2, 7)]:
        parts = [
            (bits, bits == 8, 16, columns // gpu_rounding.planes(bits))
            for bits, columns in zip(stored, (3584, 512), strict=False)
        ]
        for tile in sorted({gpu_rounded.tile(tokens, stored, hopper) for tokens in (16, 256)}):
            name = f"rounded_product {'+'.join(map(str, stored))} tokens {tile.tokens}"
            found.append((name, gpu_rounded.rounded_product, gpu_rounded.constants(tile, parts), {"num_warps": tile.warps}))
    return found


def hadamard_cases(quick: bool, hopper: bool) -> list[Case]:
    """The widths of down_proj, with the rounding behind it and without."""
    found = []
    for width, sylvester in (
        [(14336, 512)] if quick else [(1536, 128), (8192, 8192), (11008, 32), (14336, 512), (18944, 128)]
    ):
        shape = gpu_hadamard.shape_of(width, sylvester, torch.bfloat16, hopper)
        few = shape._replace(taken=min(shape.taken, gpu_hadamard.LEAST))
        cut = [(shape, True)] * shape.whole + [(shape, False), (few, False)] * (not quick)
        for shape, rounds in cut:
            constants = {
                "ROUND": rounds, "CENTRED": False, "PLANES": 2, "ROWS": shape.taken, "COLUMNS": shape.columns,
                "CHUNK": shape.chunk, "PRECISION": "tf32x3",
            }  # fmt: skip
            name = f"transform {width}{' rounded' * rounds} {shape.taken} rows"
            found.append((name, gpu_hadamard.transform, constants, {"num_warps": gpu_hadamard.warps(shape)} | UNFUSED))
    return found


def packed_cases(quick: bool, hopper: bool) -> list[tuple[str, object, dict]]:
    widths = [4] if quick else [2, 3, 4, 5, 6, 7, 8]
    found = [case for bits in widths for case in _product_cases(bits, False, quick, hopper)]
    found += [case for bits in [*widths, 16] for case in _product_cases(bits, True, quick, hopper)]
    found += [
        (f"group_expand {bits}", gpu_groups.group_expand, {"EIGHT_BITS": eight, "CENTRE": eight, "BITS": bits, **TILE})
        for bits in widths
        for eight in (True, False)
    ]
    for width, queries in [(128, 4)] if quick else [(64, 3), (128, 4), (128, 8), (128, 16), (256, 4), (256, 16)]:
        queries = min(queries, gpu_group_products.most_queries(hopper))
        name = f"width {width} queries {queries}"
        constants = gpu_attention.constants(queries, width, width) | {
            "CHANNELS": gpu_attention.CHANNELS,
            "PRECISION": "tf32x3",
        }
        found.append((f"group_finish {name}", gpu_attention.group_finish, constants))
        for bits in widths:
            for dtype in (torch.bfloat16, torch.float32) if width == 128 else (torch.float32,):  # three parts or two
                constants = gpu_group_products.constants_of_scores(bits, queries, width, width, 64, dtype) | ATTENTION
                case = f"{bits} {name} {dtype}"
                found.append((f"group_scores {case}", gpu_group_products.group_scores, constants | {"CENTRE": True}))
                constants = gpu_group_products.constants_of_sums(bits, queries, width, width // 32, dtype) | ATTENTION
                found.append((f"group_sums {case}", gpu_group_products.group_sums, constants))
    return [*found, ("add_up", gpu.add_up, {"ADDED": gpu.ADDED})]


def _product_cases(bits: int, masked: bool, quick: bool, hopper: bool) -> list[tuple[str, object, dict]]:
    """A packed weight multiplied out, with one token and with the most, and with its tile scaled."""
    stored = {"BITS": bits, "MASKED": masked, "ROWS": gpu_products.ROWS}
    name = f"{'sparse ' * masked}{bits}"
    columns = gpu_products.COLUMNS // (1 if hopper else 2)
    found = [(f"packed_expand {name}", gpu_products.packed_expand, stored | {"EIGHTS": columns // 8})]
    for extra, tokens, scaled in (("", 1, False), (" most tokens", 64, False), (" scaled", 1, True)):
        if not (quick and extra) and not (bits == 16 and scaled):
            tile = gpu_products.tile(tokens, scaled, hopper)
            more = {"EIGHTS": tile.columns // 8, "TOKENS": tile.tokens, "SCALED": scaled, "PRECISION": "tf32x3"}
            found.append((f"packed_product {name}{extra}", gpu_products.packed_product, stored | more))
    return found


def decode_cases(quick: bool) -> list[Case]:
    """The product of one token, with groups of 128; codes behind a mask with learned atoms, too."""
    found = []
    for bits, masked in [(4, False), (16, True)] if quick else [(b, m) for b in (*range(2, 9), 16) for m in (False, True)]:
        if masked or bits < 16:
            rows, warps = gpu_decode.masked_tile(bits) if masked else (gpu_decode.ROWS, gpu_decode.WARPS)
            constants = {
                "BITS": bits, "MASKED": masked, "GROUP": 16, "UNITS": masked and bits < 16, "ROWS": rows,
                "EIGHTS": gpu_decode.LANES * warps,
            }  # fmt: skip
            name = f"decode_product {'sparse ' * masked}{bits}"
            found.append((name, gpu_decode.decode_product, constants, {"num_warps": warps}))
    return found


def compiled(kernel: object, constants: dict, options: dict, target: str) -> object:
    if "PRECISION" in constants and target.startswith("gfx"):
        constants = constants | {"PRECISION": "ieee"}
    types = POINTERS | TYPES.get(kernel.fn.__name__, {})
    types["values"] = "*bf16" if constants.get("BITS", 16) == 16 else "*u8"
    types["affine"] = "*u8" if constants.get("EIGHT_BITS") else "*bf16"
    if kernel is gpu_packing.group_pack:  # scales are written as they are stored
        types["affine"] = "*u8" if constants["UNITS"] else "*i16"
    words = {2: "*i16", 4: "*i32", 8: "*i64"}
    if kernel in (gpu_group_products.group_scores, gpu_group_products.group_sums):
        types["packed"] = words.get(constants["BITS"], "*u8")
    products = gpu_products.packed_product, gpu_products.packed_expand, gpu_decode.decode_product
    if kernel in products and not constants["MASKED"]:
        bytewise = constants["BITS"] == 8 and kernel is not gpu_decode.decode_product
        types["values"] = "*u8" if bytewise else words.get(constants["BITS"], "*u8")
    if kernel is gpu_hadamard.transform:
        types["y"] = "*i8" if constants["ROUND"] else "*bf16"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    multiples = ALIGNED.get(kernel.fn.__name__, ())
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if name in multiples or types.get(name, "").startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def figures(kernel: object) -> dict[str, object]:
    """Registers, spills, shared memory, matrix instructions and the longest innermost loop."""
    if "hsaco" in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        matrix = Counter(re.findall(r"\bv_mfma_[a-z0-9]+", text))
        spills = count["vgpr_spill_count"]
        return {"registers": count["vgpr_count"], "spills": spills, "shared": kernel.metadata.shared, "matrix": matrix}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    matrix = Counter(re.findall(r"\b[HI]G?MMA\b", code))
    loop = _longest_loop(code)
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared, "matrix": matrix, "loop": loop}


def _longest_loop(code: str) -> int:
    """Instructions of the longest stretch that a branch jumps back over and that holds no other."""
    labels: dict[str, int] = {}
    jumps, count = [], 0
    for line in code.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        elif re.match(r"^\s+/\*\w+\*/", line):
            count += 1
            back = re.search(r"BRA.*?(\.L_x_\d+)", line)
            if back and back[1] in labels:
                jumps.append((labels[back[1]], count))
    inner = [(a, b) for a, b in jumps if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in jumps)]
    return max((b - a for a, b in inner), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    failed = 0
    for target in ("sm_90",) if quick else TARGETS:
        for name, kernel, constants, options in cases(quick, target):
            line = {"kernel": name, "target": target, **figures(compiled(kernel, constants, options, target))}
            loop = line.pop("loop", 0)
            weights = 2 * gpu_products.ROWS * 8 * constants.get("EIGHTS", 0)  # two steps
            if kernel is gpu_rounded.rounded_product:
                weights = constants["ROWS"] * constants["LOW_RUNS"] * constants["LOW_PLANES"]
            if kernel is gpu_decode.decode_product:
                weights = constants["ROWS"] * 8 * constants["EIGHTS"]
            if loop and ("_product" in name and constants.get("HIGH", 0) == 0):
                line["instructions_per_weight"] = round(loop * 32 * options["num_warps"] / weights, 2)
            limit = 1.1 * BUDGET.get(name, float("inf"))
            good = line["spills"] == 0 and line["registers"] <= REGISTERS.get(target, 256)
            good &= kernel is not gpu_rounded.rounded_product or any(map(INTEGER.match, line["matrix"]))
            good &= target != "sm_90" or line.get("instructions_per_weight", 0) <= limit
            failed += not good
            print(json.dumps(line | ({} if good else {"failed": True})), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
