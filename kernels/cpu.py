"""The C++ kernels for CPUs: compiled at first use, kept in the user's cache, and called through ctypes.

A plain C interface instead of a torch extension: it compiles in two seconds where torch's headers take a minute, and needs
nothing but a compiler. The file name holds a hash of source, compiler flags and processor, so a changed one of them is
another file. Without a compiler every op runs its reference, and says so once.

Legend: M tokens, N output neurons, K columns.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.kernels.layout import outer_stride, tokens_of_row
from compress.kernels.notice import reference_runs
from compress.kernels.part import Part

_PARTS = 8  # of a sum over tokens: whatever the threads, it is added up in the same order
MOST_TOKENS = 16  # above, weights are multiplied out: they are read once for all tokens, and MKL is faster
_SCRATCH_BYTES = 2 << 20  # of a weight multiplied out: within any second-level cache and its neighbour
_SOURCES = sorted(Path(__file__).parent.glob("cpu_*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("cpu_*.h"))
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where they cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    reason = "no C++ compiler was found"
    if compiler and platform.system() == "Linux":
        text = b"".join(file.read_bytes() for file in (*_HEADERS, *_SOURCES))
        key = hashlib.sha256(text + " ".join((compiler, *_FLAGS, _processor())).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-compress" / "kernels"
        file = folder / f"{key}.so"
        try:
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / file.name
                    # torch's own OpenMP runtime is in the process already: two of them would fight for the cores
                    command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
                    subprocess.run(command, check=True, capture_output=True, text=True)
                    made.replace(file)
            return ctypes.CDLL(str(file))
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            reason = f"compiling them failed: {said.strip().splitlines()[0] if said.strip() else error}"
    elif compiler:
        reason = f"they are built on Linux, this is {platform.system()}"
    reference_runs(f"no kernels for this CPU, {reason}")
    return None


def usable(x: Tensor) -> bool:
    """Whether the kernels can take inputs like these; compiles them at the first call."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and compiled() is not None


def direct(x: Tensor) -> bool:
    """Whether an op may be called as a plain function: torch's dispatcher costs a small layer as much as its product."""
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    return x.device.type == "cpu" and not traced and not (x.requires_grad and torch.is_grad_enabled())


class _Part(ctypes.Structure):
    """Part of cpu_inputs.h: `compress.kernels.part.Part` as C++ has it."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("start", "width", "row_bytes", "group", "groups", "segment", "slice")),
        ("bits", ctypes.c_int),
        ("seen_bits", ctypes.c_int),
        ("clip", ctypes.c_float),
    ]


def integer_linear(x_MK: Tensor, parts: Sequence[Part]) -> Tensor:
    """`[M, N]`, in the dtype of the inputs, of few tokens and a packed weight with bf16 scales, codes against codes.

    Inputs that the model does not round are rounded to 15 bits and a sign per segment, which must begin at multiples of 8.
    """
    if x_MK.dtype not in (torch.float32, torch.bfloat16):
        return integer_linear(x_MK.float(), parts).to(x_MK.dtype)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    tokens, rows = len(x_MK), len(parts[0].packed)
    stored = (_Part * len(parts))()
    for place, part in zip(stored, parts, strict=True):
        packed, scale, width = part.packed, part.scale, part.width
        place.packed, place.scale, place.start, place.width = packed.data_ptr(), scale.data_ptr(), part.start, width
        place.row_bytes, place.group, place.groups = packed.shape[1], part.group_size or width, scale.shape[1]
        place.segment, place.slice, place.bits = part.segment, width // part.slices, part.bits
        place.seen_bits, place.clip = part.seen_bits, part.clip
    y_MN = x_MK.new_empty(tokens, rows)
    narrow = ctypes.c_int(x_MK.dtype == torch.bfloat16)
    compiled().integer_linear(
        _pointer(x_MK), narrow, ctypes.c_long(x_MK.stride(0)), stored, ctypes.c_int(len(parts)), _pointer(y_MN), narrow,
        ctypes.c_long(tokens), ctypes.c_long(x_MK.shape[1]), ctypes.c_long(rows), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return y_MN


def butterflies(y: Tensor) -> None:
    """Sylvester's transform of the last dimension, a power of two, of a contiguous fp32 tensor, in place, not scaled."""
    width = y.shape[-1]
    compiled().butterflies(
        _pointer(y), *map(ctypes.c_long, (y.numel() // width, width)), ctypes.c_int(torch.get_num_threads())
    )


def expanded(packed: Tensor, scale_NG: Tensor, bits: int, group_size: int, out_NK: Tensor) -> None:
    """Write the fp32 weight of packed codes into `[N, K]`, which may be a slice of columns."""
    rows, width = out_NK.shape
    compiled().expand_integers(
        *map(_pointer, (packed, scale_NG, out_NK)),
        *map(ctypes.c_long, (rows, width, packed.shape[1])),
        ctypes.c_int(bits),
        *map(ctypes.c_long, (group_size or width, scale_NG.shape[1], out_NK.stride(0))),
        ctypes.c_int(torch.get_num_threads()),
    )


def sparse_product(
    x_MA: Tensor, values: Tensor, scale_NG: Tensor | None, mask: Tensor, units: int, bits: int, group_size: int
) -> Tensor:
    """`[M, N]` fp32 of inputs and bitmask-packed rows over `units` unit atoms and then the learned ones.

    The values are bf16, or integers with scales; of these, both the units and the groups must be multiples of 8.
    """
    x = x_MA.float().contiguous()
    y = torch.empty(len(x), len(values))
    sizes, threads = (len(x), len(values), x.shape[1]), ctypes.c_int(torch.get_num_threads())
    if scale_NG is None:
        row = map(ctypes.c_long, (*sizes, values.shape[1]))
        compiled().sparse_product(*map(_pointer, (x, values, mask, y)), *row, threads)
        return y
    compiled().sparse_integer_product(
        *map(_pointer, (x, values, scale_NG, mask, y)),
        *map(ctypes.c_long, (*sizes, units, values.shape[1])),
        ctypes.c_int(bits),
        *map(ctypes.c_long, (group_size, scale_NG.shape[1])),
        threads,
    )
    return y


def expanded_sparse(
    packed: Tensor, scale_NG: Tensor | None, mask: Tensor, units: int, bits: int, group_size: int, out_NA: Tensor
) -> None:
    """Write the fp32 codes of bitmask-packed rows into a contiguous `[N, A]`; arguments and limits as in the product."""
    scale = mask if scale_NG is None else scale_NG
    compiled().expand_sparse(
        *map(_pointer, (packed, scale, mask, out_NA)),
        *map(ctypes.c_long, (*out_NA.shape, units, packed.shape[1])),
        ctypes.c_int(bits),
        *map(ctypes.c_long, (group_size, scale.shape[1])),
        ctypes.c_int(torch.get_num_threads()),
    )


def product_by_blocks(x_MK: Tensor, rows: int, expand: Callable[[slice, Tensor], None]) -> Tensor:
    """`[M, N]` fp32 of inputs and a weight that `expand(rows, out)` multiplies out, some rows at a time.

    What fits the cache is read there; a whole weight in fp32 would go through memory twice, and fresh pages for it cost as
    much as the product with a hundred tokens.
    """
    tokens, width = x_MK.shape
    step = max(8, _SCRATCH_BYTES // (4 * width))
    scratch, y_NM = torch.empty(min(step, rows), width), torch.empty(rows, tokens)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        weight = scratch[: part.stop - first]
        expand(part, weight)
        torch.mm(weight, x_MK.T, out=y_NM[part])
    return y_NM.T.contiguous()


def expand_groups(
    packed: Tensor, affine: Tensor, bits: int, runs: int, out: Tensor, units: Tensor | None, centre: Tensor | None
) -> None:
    """Write groups of a KV cache multiplied out into `[batch, heads, tokens, channels]` fp32 or bf16.

    Batch and heads of every tensor must be one dimension in memory, up to 512 runs; see `compress.kernels.affine_groups`.
    """
    batch, heads, tokens, channels = out.shape
    rows = packed.shape[2]
    extra = _floats(units, centre)
    compiled().expand_groups(
        *_stored(packed, affine),
        *map(_optional, extra),
        _pointer(out), ctypes.c_int(out.dtype == torch.bfloat16), *map(ctypes.c_long, (outer_stride(out), out.stride(2))),
        *map(ctypes.c_long, (batch * heads, rows, tokens // rows, runs, channels // runs)),
        *map(ctypes.c_int, (bits, torch.get_num_threads())),
    )  # fmt: skip


def group_scores(
    query: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, units: Tensor | None, centre: Tensor | None
) -> Tensor | None:
    """Products `[batch, heads, queries, tokens]` of queries with a cache's groups; None for shapes that it does not know."""
    batch, heads, queries, width = query.shape
    rows = packed.shape[2]
    tokens = tokens_of_row(packed, bits, width)
    query, scores = query.float().contiguous(), torch.empty(batch, heads, queries, rows * tokens)
    extra = _floats(units, centre)
    done = compiled().group_scores(
        *_stored(packed, affine),
        *map(_optional, extra),
        *map(_pointer, (query, scores)),
        *map(ctypes.c_long, (batch * heads, queries, rows, tokens, runs, width // runs)),
        *map(ctypes.c_int, (bits, torch.get_num_threads())),
    )
    return scores if done else None


def group_sums(
    weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None
) -> Tensor | None:
    """Sums `[batch, heads, queries, width]` of a cache's rows of one token, each times its weight; None as above."""
    batch, heads, queries, rows = weights.shape
    parts = _PARTS
    weights, sums = weights.float().contiguous(), torch.empty(parts, batch, heads, queries, width)
    extra = _floats(units)
    done = compiled().group_sums(
        *_stored(packed, affine),
        *map(_optional, extra),
        *map(_pointer, (weights, sums)),
        *map(ctypes.c_long, (parts, batch * heads, queries, rows, runs, width // runs)),
        *map(ctypes.c_int, (bits, torch.get_num_threads())),
    )
    return sums.sum(dim=0) if done else None


def _stored(packed: Tensor, affine: Tensor) -> tuple[object, ...]:
    """Codes, scales and minima with their strides, as the kernels of a KV cache take them."""
    eight_bits = ctypes.c_int(affine.dtype == torch.uint8)
    return (
        _pointer(packed), *map(ctypes.c_long, (outer_stride(packed), packed.stride(2))),
        _pointer(affine), *map(ctypes.c_long, (outer_stride(affine), affine.stride(2))), eight_bits,
    )  # fmt: skip


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float().contiguous() for tensor in tensors]


def _optional(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else _pointer(tensor)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
