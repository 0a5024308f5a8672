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
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from compress.kernels.layout import outer_stride, tokens_of_row
from compress.kernels.notice import reference_runs
from compress.kernels.part import Part

DTYPES = (torch.float32, torch.bfloat16)  # of inputs and outputs
_PARTS = 8  # of a sum over tokens: whatever the threads, it is added up in the same order
MOST_TOKENS = 16  # above, weights are multiplied out: they are read once for all tokens, and MKL is faster
_SCRATCH_BYTES = 2 << 20  # of a weight multiplied out: within any second-level cache and its neighbour
_SOURCES = sorted(Path(__file__).parent.glob("cpu_*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("cpu_*.h"))
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int}
_FUNCTIONS = {  # the types of their arguments, told once: converting each at every call takes longer than a small product
    "integer_linear": "pilpipillli",
    "expand_integers": "ppplllillli",
    "sparse_linear": "pippppilllllilli",
    "expand_sparse": "ppppllllilli",
    "hadamard": "pilpiplllli",
    "expand_groups": "pllpllipppilllllllii",
    "group_scores": "pllpllippppllllllii",
    "group_sums": "pllpllipppllllllii",
}
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where they cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    reason = "no C++ compiler was found"
    if compiler and platform.system() == "Linux":
        text = b"".join(file.read_bytes() for file in (*_HEADERS, *_SOURCES))
        made_for = " ".join((compiler, *_FLAGS, _processor(), *platform.libc_ver()))
        file = f"{hashlib.sha256(text + made_for.encode()).hexdigest()[:16]}.so"
        try:
            return _declared(_built(_folder(file) / file, compiler))
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            reason = f"compiling them failed: {said.strip().splitlines()[0] if said.strip() else error}"
    elif compiler:
        reason = f"they are built on Linux, this is {platform.system()}"
    reference_runs(f"no kernels for this CPU, {reason}")
    return None


def _folder(file: str) -> Path:
    """Where a file is or is to be made: the user's cache, or, where that cannot be written, a folder of this user alone
    among temporary files.

    Raises:
        OSError: neither is to be had.
    """
    with suppress(OSError, RuntimeError):  # no home, or one that is read only
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-compress" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / file).exists() or os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"subspace-compress-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # a link could be pointed elsewhere later
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others, who could put a library of theirs there")
    return folder


def _built(file: Path, compiler: str) -> ctypes.CDLL:
    """The library, compiled unless it is there and can be loaded."""
    if file.exists():
        with suppress(OSError):  # cut off, or of another machine
            return ctypes.CDLL(str(file))
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        # torch's own OpenMP runtime is in the process already: two of them would fight for the cores
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(file)
    return ctypes.CDLL(str(file))


def _fp32(*shape: int) -> Tensor:
    """Room for what C++ writes, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in _FUNCTIONS.items():
        getattr(library, name).argtypes = [_TYPES[letter] for letter in letters]
    return library


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
        *((name, ctypes.c_void_p) for name in ("packed", "scale")),
        *((name, ctypes.c_long) for name in ("start", "width", "row_bytes", "group", "groups", "slice")),
        *((name, ctypes.c_int) for name in ("bits", "seen_bits")),
        ("clip", ctypes.c_float),
    ]


@lru_cache(maxsize=4096)
def _stored_parts(*parts: tuple) -> ctypes.Array:
    """Remembered by all that is in them, addresses too: filling them anew takes as long as a small product."""
    return (_Part * len(parts))(*parts)


def _require_here(packed: Tensor) -> None:
    if not packed.is_cpu:
        raise RuntimeError(f"inputs on the CPU meet a weight on {packed.device}; move one of them")


def integer_linear(x_MK: Tensor, parts: Sequence[Part]) -> Tensor:
    """`[M, N]`, in the dtype of the inputs, of few tokens and a packed weight with bf16 scales, codes against codes.

    Inputs are rounded to 15 bits and a sign per group of the weight, which must begin at multiples of 8; to the bits and
    slices of a part first, if it has any, and then not again where a group lies in one slice.
    """
    if x_MK.dtype not in DTYPES:
        return integer_linear(x_MK.float(), parts).to(x_MK.dtype)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    _require_here(parts[0].packed)
    (tokens, width), rows = x_MK.shape, parts[0].packed.shape[0]
    stored = []
    for packed, scale, bits, start, stop, group, seen_bits, slices, clip in parts:
        columns = stop - start
        shape = start, columns, packed.shape[1], group or columns, scale.shape[1], columns // slices
        stored.append((packed.data_ptr(), scale.data_ptr(), *shape, bits, seen_bits, clip))
    y_MN, narrow = x_MK.new_empty(tokens, rows), x_MK.dtype == torch.bfloat16
    compiled().integer_linear(
        x_MK.data_ptr(), narrow, x_MK.stride(0), _stored_parts(*stored), len(parts), y_MN.data_ptr(), narrow,
        tokens, width, rows, torch.get_num_threads(),
    )  # fmt: skip
    return y_MN


def hadamard(x_RI: Tensor, base_mm: Tensor, block: int) -> Tensor:
    """Rows of blocks, in fp32 or bf16, times the Hadamard matrix of order `block` = m 2^k, from H_m in fp32."""
    x_RI = x_RI if x_RI.stride(1) == 1 else x_RI.contiguous()
    (rows, width), m, narrow = x_RI.shape, base_mm.shape[0], x_RI.dtype == torch.bfloat16
    y_RI = x_RI.new_empty(rows, width)
    compiled().hadamard(
        x_RI.data_ptr(), narrow, x_RI.stride(0), y_RI.data_ptr(), narrow, base_mm.data_ptr(), rows, width // block, m,
        block // m, torch.get_num_threads(),
    )  # fmt: skip
    return y_RI


def expanded(packed: Tensor, scale_NG: Tensor, bits: int, group_size: int, out_NK: Tensor) -> None:
    """Write the fp32 weight of packed codes into `[N, K]`, which may be a slice of columns."""
    rows, width = out_NK.shape
    compiled().expand_integers(
        packed.data_ptr(), scale_NG.data_ptr(), out_NK.data_ptr(), rows, width, packed.shape[1], bits,
        group_size or width, scale_NG.shape[1], out_NK.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def sparse_linear(
    x_MA: Tensor, values: Tensor, scale_NG: Tensor | None, mask: Tensor, units: int, bits: int, group_size: int
) -> Tensor:
    """`[M, N]`, in the dtype of the inputs, of few tokens and bitmask-packed rows over `units` unit atoms and then the
    learned ones.

    The values are bf16, or integers with scales; of these, both the units and the groups must be multiples of 8.
    """
    if x_MA.dtype not in DTYPES:
        return sparse_linear(x_MA.float(), values, scale_NG, mask, units, bits, group_size).to(x_MA.dtype)
    _require_here(values)
    x_MA, narrow = x_MA.contiguous(), x_MA.dtype == torch.bfloat16
    (tokens, atoms), (rows, row_values) = x_MA.shape, values.shape
    y_MN = x_MA.new_empty(tokens, rows)
    scale, groups = (None, 0) if scale_NG is None else (scale_NG.data_ptr(), scale_NG.shape[1])
    compiled().sparse_linear(
        x_MA.data_ptr(), narrow, values.data_ptr(), scale, mask.data_ptr(), y_MN.data_ptr(), narrow, tokens, rows, atoms,
        units, row_values, bits, group_size, groups, torch.get_num_threads(),
    )  # fmt: skip
    return y_MN


def expanded_sparse(
    packed: Tensor, scale_NG: Tensor | None, mask: Tensor, units: int, bits: int, group_size: int, out_NA: Tensor
) -> None:
    """Write the fp32 codes of bitmask-packed rows into a contiguous `[N, A]`; arguments and limits as in the product."""
    scale = mask if scale_NG is None else scale_NG
    compiled().expand_sparse(
        packed.data_ptr(), scale.data_ptr(), mask.data_ptr(), out_NA.data_ptr(), *out_NA.shape, units, packed.shape[1],
        bits, group_size, scale.shape[1], torch.get_num_threads(),
    )  # fmt: skip


def product_by_blocks(x_MK: Tensor, rows: int, expand: Callable[[slice, Tensor], None]) -> Tensor:
    """`[M, N]` fp32 of inputs and a weight that `expand(rows, out)` multiplies out, some rows at a time.

    What fits the cache is read there; a whole weight in fp32 would go through memory twice, and fresh pages for it cost as
    much as the product with a hundred tokens.
    """
    tokens, width = x_MK.shape
    step = max(8, _SCRATCH_BYTES // (4 * width))
    scratch, y_NM = _fp32(min(step, rows), width), _fp32(rows, tokens)
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
        *_stored(packed, affine), *map(_address, extra), out.data_ptr(), out.dtype == torch.bfloat16, outer_stride(out),
        out.stride(2), batch * heads, rows, tokens // rows, runs, channels // runs, bits, torch.get_num_threads(),
    )  # fmt: skip


def group_scores(
    query: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, units: Tensor | None, centre: Tensor | None
) -> Tensor | None:
    """Products `[batch, heads, queries, tokens]` of queries with a cache's groups; None for shapes that it does not know."""
    batch, heads, queries, width = query.shape
    rows = packed.shape[2]
    tokens = tokens_of_row(packed, bits, width)
    query, scores = query.float().contiguous(), _fp32(batch, heads, queries, rows * tokens)
    extra = _floats(units, centre)
    done = compiled().group_scores(
        *_stored(packed, affine), *map(_address, extra), query.data_ptr(), scores.data_ptr(), batch * heads, queries, rows,
        tokens, runs, width // runs, bits, torch.get_num_threads(),
    )  # fmt: skip
    return scores if done else None


def group_sums(
    weights: Tensor, packed: Tensor, affine: Tensor, bits: int, runs: int, width: int, units: Tensor | None
) -> Tensor | None:
    """Sums `[batch, heads, queries, width]` of a cache's rows of one token, each times its weight; None as above."""
    batch, heads, queries, rows = weights.shape
    parts = _PARTS
    weights, sums = weights.float().contiguous(), _fp32(parts, batch, heads, queries, width)
    extra = _floats(units)
    done = compiled().group_sums(
        *_stored(packed, affine), *map(_address, extra), weights.data_ptr(), sums.data_ptr(), parts, batch * heads, queries,
        rows, runs, width // runs, bits, torch.get_num_threads(),
    )  # fmt: skip
    return sums.sum(dim=0) if done else None


def _stored(packed: Tensor, affine: Tensor) -> tuple[object, ...]:
    """Codes, scales and minima with their strides, as the kernels of a KV cache take them."""
    codes = packed.data_ptr(), outer_stride(packed), packed.stride(2)
    return *codes, affine.data_ptr(), outer_stride(affine), affine.stride(2), affine.dtype == torch.uint8


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float().contiguous() for tensor in tensors]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
