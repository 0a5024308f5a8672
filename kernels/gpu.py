"""What the Triton kernels share, and sums of programs added up.

Nothing is added up in bf16, which Triton's interpreter gets wrong.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not a dependency outside Linux
    triton = None

FULL = 16  # warps that keep a processor of a GPU busy
ADDED = 1024  # sums that a program of add_up adds
WARPS = 4

if triton:

    @triton.jit
    def affine_at(at, used, unit, EIGHT_BITS: tl.constexpr):
        """Scales or minima as fp32."""
        return affine_of(tl.load(at, mask=used, other=0), unit, EIGHT_BITS)

    @triton.jit
    def affine_of(stored, unit, EIGHT_BITS: tl.constexpr):
        """The same of what was read: 16-bit floats, or the bytes of e4m3, taken apart because sm_80 does not know it."""
        if EIGHT_BITS:
            byte = stored.to(tl.int32)
            half = (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True)  # 2^-8 of it
            return tl.where((byte & 127) == 127, float("nan"), half.to(tl.float32)) * (unit * 256)  # no infinity, one NaN
        return stored.to(tl.float32)

    @triton.jit
    def add_up(sums, y, P, size, ADDED: tl.constexpr):
        """y[i] = sums[0, i] + sums[1, i] + .. in this order, in the dtype of y."""
        i = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
        at, total = sums + i, tl.zeros((ADDED,), tl.float32)
        for _ in range(P):
            total += tl.load(at, mask=i < size, other=0)
            at += size
        tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


def usable(x: Tensor) -> bool:
    """Whether the kernels can take inputs like these."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def precision() -> str:
    """Of fp32 matrix products: to the last bits, by three tf32 products where the hardware has them."""
    return "ieee" if torch.version.hip else "tf32x3"


@cache
def processors(device: torch.device) -> int:
    """Of a GPU; a CPU stands for a small one, in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def shares(steps: int, warps: int, tokens: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """How many programs had better share the steps of a product that takes `warps` warps, and the steps of each.

    They fill the GPU, but sums are not to move more bytes than the rows of the weight do: 4 written and read per token.
    """
    wanted = min(FULL * processors(device) // max(1, warps), row_bytes // (8 * max(1, tokens)))
    each = -(-steps // max(1, min(steps, wanted)))
    return -(-steps // each), each


def added_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """`[P, M, N]` fp32 to `[M, N]`, in order, rounded once."""
    y = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    add_up[(triton.cdiv(y.numel(), ADDED),)](sums, y, len(sums), y.numel(), ADDED=ADDED, num_warps=WARPS)
    return y


def as_words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes as rows of words, copied where they do not begin at one."""
    return (packed.clone() if packed.storage_offset() % dtype.itemsize else packed).view(dtype)


def hopper() -> bool:
    """Whether tensor cores take a factor from shared memory, which leaves registers for larger tiles."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
