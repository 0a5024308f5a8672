"""The Hadamard transform on a GPU: two matrix products per row, and the rounding that follows in the same pass.

A row of I inputs is taken as a matrix X [R, C], C = 16, 32 or 64 of its Sylvester part; `compress.kernels.hadamard` is then

    Y = (1 / sqrt(n)) base X S_C      base [R, R] = I_blocks kron H_{n / C}, symmetric, of +-1

The base is read from memory, S_C is made from its indices. 14336 is 224 x 64, 11008 is 344 x 32, 8192 is 128 x 64. The first
product is exact in the 16 bits of the inputs, signs being exact in any; its fp32 sums are split in three tf32 pieces for the
second, which is then exact too. Sums are fp32. The result is cast to the dtype of x, as the op does.

Where a program holds the whole row it goes on with the range and writes int8 codes (`compress.kernels.gpu_rounding`): a byte
per input, where the reference makes a dozen passes for the transform and fifteen for the codes. Longer rows, and all
where tokens are too few to fill the GPU, are cut into slabs of the tile, one program each, and rounded by another kernel.
Cost: I (R + 3 C) multiply-adds per token on tensor cores; the base, R^2 bytes, comes from the L2 cache for every token.

Legend: M tokens, I inputs, R x C tile of a row, n order of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.gpu import precision, processors, triton
from compress.kernels.gpu_rounding import Codes, planes, room_for

LARGEST_BASE = 1024  # rows of a tile
SLAB = 8192  # numbers of a tile that every GPU holds in registers; twice as many where all goes well
LEAST = 16  # rows of a tile that a program takes of a token, if tokens are few

if triton:
    import triton.language as tl

    from compress.kernels.gpu_rounding import scale_and_zero, stored_codes

    @triton.jit
    def _sylvester(ORDER: tl.constexpr):
        """(-1)^(bits that i and j share), ORDER at most 256."""
        i = tl.arange(0, ORDER)
        shared = i[:, None] & i[None, :]
        shared ^= shared >> 4
        shared ^= shared >> 2
        shared ^= shared >> 1
        return (1 - 2 * (shared & 1)).to(tl.float32)

    @triton.jit
    def _tf32_piece(x):
        """The leading 11 bits."""
        return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)

    @triton.jit
    def transform(
        x, base, y, scale, zero, rows, x_stride, y_stride, factor, plane, count, top, clip,
        ROUND: tl.constexpr, CENTRED: tl.constexpr, PLANES: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """y = factor base x S for some rows of a token's tile; with ROUND all of them, as codes, a scale and a zero."""
        token = tl.program_id(0).to(tl.int64)
        r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        tile = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, rows, CHUNK):
            k = first + tl.arange(0, CHUNK)
            there = k < rows
            sign = tl.load(base + r[:, None] * rows + k[None, :], mask=(r < rows)[:, None] & there[None, :], other=0)
            value = tl.load(x + token * x_stride + k[:, None] * COLUMNS + c[None, :], mask=there[:, None], other=0)
            tile = tl.dot(sign.to(x.dtype.element_ty), value, tile, input_precision=PRECISION)
        sylvester = _sylvester(COLUMNS)
        if PRECISION == "ieee":
            tile = tl.dot(tile, sylvester, input_precision="ieee")
        else:
            piece = _tf32_piece(tile)
            sums = tl.dot(piece, sylvester, input_precision="tf32")
            for _ in tl.static_range(2):
                tile -= piece
                piece = _tf32_piece(tile)
                sums = tl.dot(piece, sylvester, sums, input_precision="tf32")
            tile = sums
        tile = (tile * factor).to(x.dtype.element_ty)
        at = r[:, None] * COLUMNS + c[None, :]
        inside = at < rows * COLUMNS
        if ROUND:
            tile = tile.to(tl.float32)  # rows past the last are zero, which every range holds
            least, most = tl.min(tl.min(tile, 1), 0), tl.max(tl.max(tile, 1), 0)
            squares = tl.sum(tl.sum(tile * tile, 1), 0)
            unit, shift = scale_and_zero(least, most, squares, count, top, clip)
            tl.store(scale + token, unit)
            if CENTRED:
                tl.store(zero + token, (shift - 128.0).to(tl.int32))
            tile = stored_codes(tile, unit, shift, top, CENTRED)
            at = (at % PLANES) * plane + at // PLANES
        tl.store(y + token * y_stride + at, tile, mask=inside)


class Shape(NamedTuple):
    """A row as a matrix, and how many of its rows a program takes."""

    rows: int
    columns: int
    taken: int

    @property
    def whole(self) -> bool:
        """Whether a program sees the whole row, and can round it."""
        return self.taken >= self.rows

    @property
    def chunk(self) -> int:
        """Rows that a step of the first product reads: many at once where a program has few to compute."""
        return 64 if self.taken <= 32 else 16

    def shared(self, tokens: int, device: torch.device) -> Shape:
        """More programs to a token where tokens are too few to fill the GPU."""
        taken = self.taken
        while taken > LEAST and 2 * tokens * triton.cdiv(self.rows, taken) <= processors(device):
            taken //= 2
        return self._replace(taken=taken)


def shape_of(width: int, sylvester: int, dtype: torch.dtype, hopper: bool) -> Shape | None:
    """The smallest tile for rows of blocks with a Sylvester part of that order; None for what the kernel does not know."""
    large = 2 * SLAB if dtype.itemsize == 2 else SLAB
    found = None
    for columns in (64, 32, 16):
        rows = width // columns
        if sylvester % columns or rows > LARGEST_BASE:
            continue
        padded = max(16, triton.next_power_of_2(rows))
        # a program of 64 columns and 16384 numbers spills where products take both factors from registers
        whole = padded * columns <= (SLAB if columns == 64 and not hopper else large)
        shape = Shape(rows, columns, padded if whole else SLAB // columns)
        if found is None or (whole and (not found.whole or padded * columns < found.taken * found.columns)):
            found = shape
    return found


def transformed(x: Tensor, base: Tensor, shape: Shape, block: int) -> Tensor:
    """`[..., I]` in the dtype of x."""
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = shape.shared(len(x_MI), x.device)
    _launch(x_MI, base, shape, block, (y, y, y), x.shape[-1], ROUND=False, CENTRED=False, PLANES=1)
    return y


def rounded(x_MI: Tensor, base: Tensor, shape: Shape, block: int, weight_bits: int, bits: int, clip: float) -> Codes:
    """The codes of the transformed inputs, a slice of columns of wider ones, each token with one scale."""
    room = room_for(x_MI, 1, weight_bits, bits)
    out = (room.codes, room.scale, room.scale if room.zero is None else room.zero)
    _launch(
        x_MI, base, shape, block, out, room.codes.stride(0), room.plane, float((1 << bits) - 1), clip,
        ROUND=True, CENTRED=bits == 8, PLANES=planes(weight_bits),
    )  # fmt: skip
    return room


def _launch(
    x_MI: Tensor, base: Tensor, shape: Shape, block: int, out: tuple[Tensor, Tensor, Tensor], out_stride: int,
    plane: int = 0, top: float = 0.0, clip: float = 0.0, **constants: int,
) -> None:  # fmt: skip
    transform[(len(x_MI), triton.cdiv(shape.rows, shape.taken))](
        x_MI, base, *out, shape.rows, x_MI.stride(0), out_stride, block**-0.5, plane, float(x_MI.shape[1]), top, clip,
        ROWS=shape.taken, COLUMNS=shape.columns, CHUNK=shape.chunk, PRECISION=precision(), num_warps=warps(shape),
        enable_fp_fusion=False, **constants,
    )  # fmt: skip


def warps(shape: Shape) -> int:
    return 4 if shape.taken * shape.columns <= SLAB // 2 else 8
