"""y = x A S for column-sparse codes S over unit vectors, learned atoms, or both: A = [I | D], I or D.

Layout, for I inputs, N output neurons, K learned atoms, A = K or I + K atoms in all (unit vectors first) and s nonzeros per
neuron:

    values            [N, s]           floating point, the nonzeros of neuron n in ascending order of their atom; below 16
                                       bits packed codes plus 2^(bits-1), `compress.kernels.pack`
    mask              [N, ceil(A / 8)] uint8; atom 8 j + b of neuron n is used when bit b (least significant first) of byte
                                       j is set, bits past A are zero; absent when all atoms are used
    scale             [N, G]           of codes: one per neuron and `group_size` atoms, unit and learned ones apart
    dictionary        [I, K]           one learned atom per column; below 16 bits packed codes; absent without learned atoms
    dictionary_scale  [K]              of its codes

At A = 2 s, one mask bit per atom is the entropy bound and costs 2 bits per nonzero; 16-bit indices would cost 16. With unit
vectors alone the codes are the weight itself, pruned: nothing is multiplied twice.
The reference expands the codes to dense and multiplies: correct everywhere, and no faster than the dense layer.
Accumulation and output are in the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu, gpu_products
from compress.kernels.notice import reference_runs
from compress.kernels.outputs import shaped_like
from compress.kernels.pack import unpack_signed
from compress.kernels.part import Part

_BITS = tuple(1 << bit for bit in range(8))


def pack_mask(mask_NA: Tensor) -> Tensor:
    """Boolean `[N, A]` to uint8 `[N, ceil(A / 8)]`."""
    padded = torch.nn.functional.pad(mask_NA, (0, -mask_NA.shape[1] % 8))
    weights = torch.tensor(_BITS, device=mask_NA.device, dtype=torch.int32)
    return (padded.unflatten(1, (-1, 8)).int() * weights).sum(dim=2).to(torch.uint8)


def unpack_mask(mask: Tensor, atoms: int | None = None) -> Tensor:
    """uint8 `[N, ceil(A / 8)]` to boolean `[N, atoms]`; all stored bits when `atoms` is None."""
    weights = torch.tensor(_BITS, device=mask.device, dtype=torch.uint8)
    return (mask[:, :, None] & weights).ne(0).flatten(1)[:, :atoms]


def expand_codes(values: Tensor, mask: Tensor | None, atoms: int) -> Tensor:
    """The dense `[N, atoms]` form of nonzeros. Every row of the mask must hold `values.shape[1]` bits."""
    if mask is None:
        return values
    support = unpack_mask(mask, atoms)
    return values.new_zeros(support.shape).masked_scatter(support, values)


def stored_codes(
    values: Tensor, mask: Tensor | None, scale: Tensor | None, units: int, learned: int, nonzeros: int, bits: int, group: int
) -> Tensor:
    """The codes `[N, units + learned]` that packed tensors stand for: fp32, or as stored when they were not rounded."""
    if scale is None:
        return expand_codes(values, mask, units + learned)
    codes = unpack_signed(values, bits, nonzeros).float()
    widths = [min(group or part, part - at) for part in (units, learned) for at in range(0, part, group or part or 1)]
    widths_G = torch.tensor(widths, device=scale.device)
    per_atom = scale.float().repeat_interleave(widths_G, dim=1, output_size=units + learned)  # a compiler must know it
    return expand_codes(codes, mask, units + learned) * per_atom


def stored_dictionary(dictionary: Tensor, scale: Tensor | None, learned: int, bits: int) -> Tensor:
    """The learned atoms `[I, K]`: fp32, or as stored when they were not rounded."""
    if scale is None:
        return dictionary
    return unpack_signed(dictionary, bits, learned).float() * scale.float()


def sparse_dictionary_reference(
    x: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    dictionary: Tensor | None,
    dictionary_scale: Tensor | None,
    unit_atoms: bool,
    learned_atoms: int,
    nonzeros: int,
    value_bits: int,
    group_size: int,
    dictionary_bits: int,
) -> Tensor:
    """`[..., I]` to `[..., N]`; arguments as in the layout above."""
    units = x.shape[-1] if unit_atoms else 0
    codes = stored_codes(values, mask, scale, units, learned_atoms, nonzeros, value_bits, group_size).to(x.dtype)
    if dictionary is None:
        return x @ codes.T
    atoms = stored_dictionary(dictionary, dictionary_scale, learned_atoms, dictionary_bits).to(x.dtype)
    y = (x @ atoms) @ codes[:, units:].T
    return y + x @ codes[:, :units].T if unit_atoms else y


sparse_dictionary = torch.library.custom_op("compress::sparse_dictionary", sparse_dictionary_reference, mutates_args=())


@sparse_dictionary.register_kernel("cpu")
def sparse_dictionary_cpu(x: Tensor, *stored: Any) -> Tensor:
    """Few tokens: each row's nonzeros meet the inputs where the mask says. Many: codes expanded by blocks of rows,
    products in fp32."""
    values, mask, scale, dictionary, _, unit_atoms, learned, _, bits, group, _ = stored
    units = x.shape[-1] if unit_atoms else 0
    runs_here = values.dtype == (torch.uint8 if bits < 16 else torch.bfloat16) and cpu.usable(x)
    if bits < 16:
        runs_here &= group % 8 == 0 and (learned == 0 or units % 8 == 0) and scale.dtype == torch.bfloat16
        runs_here &= mask is not None or units == 0 or learned == 0
    if not runs_here:
        return sparse_dictionary_reference(x, *stored)
    u_MA = x.reshape(-1, x.shape[-1])
    few = u_MA.shape[0] <= cpu.MOST_TOKENS
    if dictionary is not None or not few or mask is None:
        u_MA = _coded(u_MA.float(), *stored)
    if mask is not None and few:
        y = cpu.sparse_linear(u_MA, values, scale, mask, units, bits, group)
    elif mask is not None:

        def expand(rows: slice, out: Tensor) -> None:
            cpu.expanded_sparse(values[rows], None if scale is None else scale[rows], mask[rows], units, bits, group, out)

        y = cpu.product_by_blocks(u_MA, len(values), expand)
    elif bits == 16:
        y = u_MA @ values.float().T
    elif few:
        width = u_MA.shape[1]
        y = cpu.integer_linear(u_MA, [Part(values, scale, bits, 0, width, group)])
    else:

        def expand(rows: slice, out: Tensor) -> None:
            cpu.expanded(values[rows], scale[rows], bits, group, out)

        y = cpu.product_by_blocks(u_MA, len(values), expand)
    return shaped_like(x, y.to(x.dtype))


@sparse_dictionary.register_kernel("cuda")
def sparse_dictionary_cuda(x: Tensor, *stored: Any) -> Tensor:
    """Few tokens: the Triton kernel on packed codes. Many: codes expanded once by another, cuBLAS."""
    values, mask, scale, _, _, unit_atoms, learned, _, bits, group, _ = stored
    x_MI, units = x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1] if unit_atoms else 0
    whole = bits == 16 or (group % 8 == 0 and (learned == 0 or units % 8 == 0))
    parts_apart = bits < 16 and units > 0 and learned > 0  # two groups: one walk must know where they part
    whole &= not parts_apart or (mask is not None and group > 0)
    if not whole:
        reference_runs(f"no GPU kernel walks groups of {group} over {units} + {learned} atoms")
    if not whole or not gpu.usable(x):
        return sparse_dictionary_reference(x, *stored)
    u_MA = _coded(x_MI, *stored)
    if mask is None and bits == 16:
        y = u_MA @ values.to(x.dtype).T
    else:
        weight = gpu_products.Weight(values, scale, bits, u_MA.shape[1], group, mask, units)
        y = gpu_products.product(u_MA, weight)
    return shaped_like(x, y)


def _coded(x_MI: Tensor, *stored: Any) -> Tensor:
    """What the codes multiply, `[M, A]`: the inputs, their products with the learned atoms, or both side by side."""
    _, _, _, dictionary, dictionary_scale, unit_atoms, learned, *_, dictionary_bits = stored
    if dictionary is None:
        return x_MI
    with torch.autocast(x_MI.device.type, enabled=False):  # both sides in one dtype
        z_MK = x_MI @ stored_dictionary(dictionary, dictionary_scale, learned, dictionary_bits).to(x_MI.dtype)
    return torch.cat([x_MI, z_MK], dim=1) if unit_atoms else z_MK


@sparse_dictionary.register_fake
def _(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *stored = inputs
    ctx.save_for_backward(*stored[:5])
    ctx.width, ctx.sizes = x.shape[-1], stored[5:]


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    """Of the inputs: what is packed is not trained."""
    values, mask, scale, dictionary, dictionary_scale = ctx.saved_tensors
    unit_atoms, *sizes, dictionary_bits = ctx.sizes
    units, learned = ctx.width if unit_atoms else 0, sizes[0]
    grad_x = grad @ stored_codes(values, mask, scale, units, *sizes).to(grad.dtype)
    if dictionary is not None:
        atoms = stored_dictionary(dictionary, dictionary_scale, learned, dictionary_bits).to(grad.dtype)
        of_units, of_learned = grad_x.split([units, learned], dim=-1)
        grad_x = of_learned @ atoms.T + of_units if units else of_learned @ atoms.T
    return grad_x, *(None,) * (5 + len(ctx.sizes))


sparse_dictionary.register_autograd(_gradient, setup_context=_remember)
