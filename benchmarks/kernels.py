"""Compile every Triton kernel for GPUs that are not here, and read what the compilers made of it.

    python -P benchmarks/kernels.py             # what `make kernels` runs: sm_80, sm_90, gfx942
    python -P benchmarks/kernels.py --quick     # one width per kernel for sm_90: part of `make test`

One JSON line per kernel, width and target: registers, spills, shared memory, and the instructions that the main loop issues
for each weight it handles. A spill, more registers than let two blocks share a processor, or a loop that has grown past its
budget by a tenth ends with status 1. Nothing is run: these are static counts, no times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # @triton.jit would return functions that cannot be compiled
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import gpu, gpu_attention, gpu_packing
from compress.kernels.affine_groups import EIGHT_BITS

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
    "query": "*fp32",
    "scores": "*fp32",
    "weights": "*fp32",
    "sums": "*fp32",
    "states": "*bf16",
    "order": "*i64",
    "moves": "*fp32",
    "errors": "*fp32",
    "codes": "*u8",
}
ATTENTION = {"TOKENS": gpu_attention.TOKENS, "QUERIES": 16, "EIGHT_BITS": True, "PRECISION": "tf32x3"}
# numbers of a group, runs, block, dtype of scales, ranges tried: the defaults of squat, kivi and values; then the largest
PACKING = [
    (64, 128, 8, EIGHT_BITS, 5), (32, 4, 0, EIGHT_BITS, 0), (64, 128, 0, EIGHT_BITS, 5), (64, 128, 8, torch.bfloat16, 5),
    (64, 128, 0, torch.bfloat16, 0), (64, 128, 0, torch.float16, 0), (128, 128, 64, EIGHT_BITS, 5),
    (8, 128, 64, EIGHT_BITS, 5), (1024, 16, 0, EIGHT_BITS, 5),
]  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")  # of a launch, among its constants
TILE = {"ROWS": gpu.ROWS, "EIGHTS": gpu.EIGHTS}
# instructions per weight of the loop on sm_90, as first measured with triton 3.9.0
BUDGET = {
    "integer_decode 2": 9.7, "integer_decode 3": 12.1, "integer_decode 4": 9.6, "integer_decode 5": 13.5,
    "integer_decode 6": 13.6, "integer_decode 7": 16.7, "integer_decode 8": 8.3, "sparse_decode 2": 39.5,
    "sparse_decode 3": 42.9, "sparse_decode 4": 39.5, "sparse_decode 5": 42.9, "sparse_decode 6": 42.9,
    "sparse_decode 7": 42.9, "sparse_decode 8": 32.3, "sparse_decode 16": 24.8,
}  # fmt: skip


def cases(quick: bool) -> list[tuple[str, object, dict]]:
    """Name, kernel and compile-time constants of what is shipped."""
    widths = [4] if quick else [2, 3, 4, 5, 6, 7, 8]
    found = [
        (f"integer_decode {bits}", gpu.integer_decode, {"ADD": False, "BITS": bits, "WORDS": bits in gpu.WORD, **TILE})
        for bits in widths
    ]
    found += [(f"integer_expand {bits}", gpu.integer_expand, {"BITS": bits, **TILE}) for bits in widths]
    found += [
        (f"group_expand {bits}", gpu.group_expand, {"EIGHT_BITS": eight, "CENTRE": eight, "BITS": bits, **TILE})
        for bits in widths
        for eight in (True, False)
    ]
    found += [
        (
            f"group_scores {bits} width {width}",
            gpu_attention.group_scores,
            {"BITS": bits, "CENTRE": True, "WIDTH": width, **ATTENTION},
        )
        for bits in widths
        for width in ([128] if quick else [64, 128, 256])
    ]
    parts = {"CHANNELS": gpu_attention.CHANNELS, "PART": gpu_attention.PART}
    found += [(f"group_sums {bits}", gpu_attention.group_sums, {"BITS": bits, **parts, **ATTENTION}) for bits in widths]
    found += [_packing(bits, *PACKING[0]) for bits in widths]
    found += [_packing(4, *shape) for shape in (PACKING[1:2] if quick else PACKING[1:])]
    return found + [(f"sparse_decode {bits}", gpu.sparse_decode, {"BITS": bits, **TILE}) for bits in [*widths, 16]]


def _packing(
    bits: int, numbers: int, runs: int, block: int, dtype: torch.dtype, fit: int
) -> tuple[str, object, dict[str, object]]:
    constants = gpu_packing.constants(numbers, runs, block, dtype) | {
        "BITS": bits, "FIT": fit, "UNITS": dtype == EIGHT_BITS, "CENTRE": numbers > 32, "PRECISION": "tf32x3"
    }  # fmt: skip
    name = (
        f"group_pack {bits}: {numbers} numbers, {runs} runs, block {block}, {str(dtype).removeprefix('torch.')}, fit {fit}"
    )
    return name, gpu_packing.group_pack, constants


def compiled(kernel: object, constants: dict, target: str) -> object:
    if "PRECISION" in constants and target.startswith("gfx"):
        constants = constants | {"PRECISION": "ieee"}
    options = {"num_warps": gpu.WARPS, **{key: constants[key] for key in OPTIONS if key in constants}}
    constants = {key: value for key, value in constants.items() if key not in OPTIONS}
    types = dict(POINTERS, values="*bf16" if constants["BITS"] == 16 else "*u8")
    types["affine"] = "*u8" if constants.get("EIGHT_BITS") else "*bf16"
    if "MANTISSA" in constants:  # of scales that are written as they are stored
        types["affine"] = "*u8" if constants["UNITS"] else "*i16"
    if constants.get("WORDS"):
        types["packed"] = "*i16" if constants["BITS"] == 2 else "*i32"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def figures(kernel: object) -> dict[str, object]:
    """Registers, spills, shared memory and the longest innermost loop."""
    if "hsaco" in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": count["vgpr_count"], "spills": count["vgpr_spill_count"], "shared": kernel.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared, "loop": _longest_loop(code)}


def _longest_loop(code: str) -> int:
    """Instructions of the longest stretch that a branch jumps back over."""
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
                jumps.append(count - labels[back[1]])
    return max(jumps, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    failed = 0
    for target in ("sm_90",) if quick else TARGETS:
        for name, kernel, constants in cases(quick):
            line = {"kernel": name, "target": target, **figures(compiled(kernel, constants, target))}
            loop = line.pop("loop", 0)
            if loop and "decode" in name:
                line["instructions_per_weight"] = round(loop * 32 * gpu.WARPS / (gpu.ROWS * gpu.EIGHTS * 8), 2)
            limit = 1.1 * BUDGET.get(name, float("inf"))
            good = line["spills"] == 0 and line["registers"] <= 256
            good &= target != "sm_90" or line.get("instructions_per_weight", 0) <= limit
            failed += not good
            print(json.dumps(line | ({} if good else {"failed": True})), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
