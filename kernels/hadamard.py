"""Orthonormal Hadamard transform of the last dimension, for every width: spreads an outlier over all its coordinates.

A Hadamard matrix has entries +-1 and H H^T = n I. Here H_n = H_m kron S_{2^k}, with m the smallest base that exists:

    m = 1              S, Sylvester's doubling: S_1 = [1], S_2n = [[S_n, S_n], [S_n, -S_n]]
    m = q + 1          Paley I,  q a prime power, q % 4 == 3 (preferred to II)
    m = 2 (q + 1)      Paley II, q a prime power, q % 4 == 1
    e.g. 1536 = 12 * 128, 576 = 36 * 16, 14336 = 28 * 512, 11008 = 344 * 32 (q = 7^3), 29568 = 924 * 32 (q = 461)

The bases are built, not tabulated. With chi(a) = 0, 1, -1 for zero, squares and the rest of GF(q), their core is
C[a, b] = chi(a + b). Paley wrote chi(a - b); reversing the columns keeps H Hadamard and makes every H here symmetric, so
the transform is its own inverse: no transpose to confuse when it is merged into a weight. The weight that follows
`hadamard(x)` is `hadamard(weight)`: both act on the last dimension, the input features.

A width that is not reachable (13696 = 107 * 128) is cut into equal blocks, H = blockdiag(H_n, .., H_n).
Compressed weights hold one particular H: a changed construction is a changed format.

Legend: I width, n order of a block, m order of the base, q = p^e elements of a field, S_{2^k} Sylvester part.
Cost: I (m + k) multiply-adds per token and k + 2 passes over x, instead of the I^2 of a dense rotation.

Paley, On orthogonal matrices, 1933. Rotation before quantization: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_hadamard
from compress.kernels.notice import reference_runs

_LARGEST_BASE = 1024  # past it the dense product with H_m is no longer a small part of the cost
_SMALL_BASE = 64  # 1,536 inputs have 12, 7,168 have 28; at 148 (18,944) both ways take as long


def hadamard_matrix(order: int) -> Tensor:
    """The symmetric H_n, int8 `[order, order]` of +-1, H H = order * eye.

    Raises:
        ValueError: when neither Paley nor doubling reaches the order, as for 92, 172 or any odd order above 1.
    """
    m = _base_order(order)
    if not m:
        raise ValueError(f"no Hadamard matrix of order {order} by Paley and Sylvester; block_order() gives one that exists")
    with torch.device("cpu"):  # whatever device the caller builds its model on, meta included
        matrix = _paley_matrix(m) if m > 1 else torch.ones(1, 1, dtype=torch.int8)
        two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        while len(matrix) < order:
            matrix = torch.kron(matrix, two)
    return matrix


@cache
def block_order(width: int) -> int:
    """Order of the blocks for a width: its largest divisor that is reachable from a base of at most 1024.

    That is the width itself for most models, and 1, no rotation at all, for an odd width.

    Raises:
        ValueError: when the width is not positive.
    """
    if width < 1:
        raise ValueError(f"expected a positive width, got {width}")
    return next(n for n in range(width, 0, -1) if width % n == 0 and 0 < _base_order(n) <= _LARGEST_BASE)


def hadamard_reference(x: Tensor, block: int = 0) -> Tensor:
    """x blockdiag(H) / sqrt(block) for x `[..., I]`: orthonormal and its own inverse. Block 0 means `block_order(I)`.

    fp64 is computed in fp64, everything else in fp32 with one cast at the end.

    Raises:
        ValueError: when the block does not divide I or is not reachable.
        TypeError: when x is not floating point.
    """
    y = _base_product(x, block)
    spare = torch.empty_like(y)
    for _ in range(y.shape[-1].bit_length() - 1):
        # One butterfly on the lowest bit of the index, which becomes the highest: after k of them all are back in place.
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        total, difference = spare.unflatten(-1, (2, -1)).unbind(-2)
        torch.add(even, odd, out=total)
        torch.sub(even, odd, out=difference)
        y, spare = spare, y
    return y.reshape(x.shape).to(x.dtype)


def _base_product(x: Tensor, block: int) -> Tensor:
    """The blocks scaled and multiplied by H_m, `[blocks, m, block / m]`, in a buffer that butterflies may write to."""
    width = x.shape[-1]
    block = block or block_order(width)
    m = _base_order(block)
    if not m or width % block:
        raise ValueError(f"no Hadamard blocks of order {block} for width {width}; block_order() gives {block_order(width)}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating point tensor, got {x.dtype}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (x.to(dtype).contiguous() * block**-0.5).reshape(-1, m, block // m)
    return _base_matrix(m, x.device, dtype) @ y if m > 1 else y  # H_m is symmetric: the same product from either side


hadamard = torch.library.custom_op("compress::hadamard", hadamard_reference, mutates_args=())


@hadamard.register_kernel("cpu")
def hadamard_cpu(x: Tensor, block: int = 0) -> Tensor:
    """All of it in C++, where runs fill a vector and H_m is small: MKL multiplies by large ones."""
    order = block or block_order(x.shape[-1])
    m = _base_order(order)
    if not m or x.shape[-1] % order or order < 8 * m or m > _SMALL_BASE or x.dtype not in cpu.DTYPES or not cpu.usable(x):
        return hadamard_reference(x, block)
    return cpu.hadamard(x.reshape(-1, x.shape[-1]), _base_matrix(m, x.device, torch.float32), order).view(x.shape)


@hadamard.register_kernel("cuda")
def hadamard_cuda(x: Tensor, block: int = 0) -> Tensor:
    """Two products in a Triton kernel."""
    known = gpu.usable(x) and gpu_base(x, x.shape[-1], block)
    return gpu_hadamard.transformed(x, *known) if known else hadamard_reference(x, block)


def gpu_base(x: Tensor, width: int, block: int = 0) -> tuple[Tensor, gpu_hadamard.Shape, int] | None:
    """What the Triton kernel is told of rows like those of x with this width: base, shape and the block's order."""
    block = block or block_order(width)
    m = _base_order(block)
    if not m or width % block or not x.is_floating_point():
        return None  # the reference says what is wrong
    shape = gpu_hadamard.shape_of(width, block // m, x.dtype, gpu.hopper())
    if shape is None:
        reference_runs(f"no GPU kernel transforms {width} inputs in Hadamard blocks of {block}")
        return None
    return _gpu_matrix(block // shape.columns, width // block, x.device), shape, block


@hadamard.register_fake
def _(x: Tensor, block: int = 0) -> Tensor:
    return x.new_empty(x.shape)


def _keep_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return hadamard(gradient, ctx.block), None  # symmetric


hadamard.register_autograd(_backward, setup_context=_keep_block)


@cache
def _base_matrix(m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """H_m for the op, which never sees fake tensors: what is remembered here is always real."""
    return hadamard_matrix(m).to(device, dtype)


@cache
def _gpu_matrix(order: int, blocks: int, device: torch.device) -> Tensor:
    """H of the order once per block, int8 on the device."""
    return torch.kron(torch.eye(blocks, dtype=torch.int8, device=device), hadamard_matrix(order).to(device))


@cache
def _base_order(order: int) -> int:
    """The smallest m for which order = m 2^k and H_m has a construction of its own; 0 when there is none."""
    if order < 1:
        return 0
    m = order // (order & -order)  # the odd part
    while order % m == 0:
        if m == 1 or _paley_field(m):
            return m
        m *= 2
    return 0


def _paley_field(m: int) -> tuple[int, int, int] | None:
    """`(type, p, e)`: Paley's construction of that type, 1 or 2, gives order m from GF(p^e)."""
    for kind, residue in ((1, 3), (2, 1)):
        q = m // kind - 1
        if m % 4 == 0 and q % 4 == residue:
            p = next((divisor for divisor in range(3, isqrt(q) + 1, 2) if q % divisor == 0), q)
            e = next(e for e in range(1, q) if p**e >= q)
            if p**e == q:
                return kind, p, e
    return None


def _paley_matrix(m: int) -> Tensor:
    """H_m from the conference matrix W, W W^T = q I, that a border of ones around the core makes."""
    kind, p, e = _paley_field(m)
    conference = torch.ones(m // kind, m // kind, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _core(p, e)
    zeros = (conference == 0).to(torch.int8)  # one per row: a permutation
    if kind == 1:
        matrix = conference + zeros
        matrix[0, 0] = -1  # cancels the extra 1 of every other row against the first
        return matrix
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(zeros, minus)


def _core(p: int, e: int) -> Tensor:
    """chi(a + b) over GF(q), q = p^e, int8 `[q, q]`. Element sum_i a_i p^i is the polynomial sum_i a_i x^i.

    The field is GF(p)[x] modulo the first x^e - tail(x) that makes it one. Counting squares finds it: were a b = 0 for
    nonzero a and b, then ((a + b) / 2)^2 = ((a - b) / 2)^2 and a square would have too many roots, so the ring is a field
    exactly when it has (q - 1) / 2 nonzero squares, that is when chi sums to zero.
    """
    q = p**e
    place = p ** torch.arange(e)
    digits_qe = torch.arange(q)[:, None] // place % p
    for tail in digits_qe:
        square = torch.zeros_like(digits_qe)
        for power in reversed(range(e)):  # Horner: square = x square + a_power a, with x^e = tail
            times_x = torch.nn.functional.pad(square[:, :-1], (1, 0)) + square[:, -1:] * tail
            square = (times_x + digits_qe[:, power, None] * digits_qe) % p
        chi = torch.full((q,), -1, dtype=torch.int8)
        chi[(square * place).sum(dim=1)] = 1
        chi[0] = 0
        if chi.sum() == 0:
            break
    total = sum((digits + digits[:, None]) % p * p**power for power, digits in enumerate(digits_qe.T))
    return chi[total]
