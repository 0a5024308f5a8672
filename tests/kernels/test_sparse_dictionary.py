"""The packed product equals the dense one, on odd shapes, in every width and in every dtype."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.pack import pack_signed
from compress.kernels.sparse_dictionary import expand_codes, pack_mask, sparse_dictionary, unpack_mask

# inputs, outputs, learned atoms, nonzeros; then whether unit vectors are atoms
SHAPES = [(1, 1, 8, 1), (7, 5, 16, 16), (63, 33, 40, 13), (64, 96, 32, 16), (100, 1, 8, 8)]
WITH_UNITS = [(1, 1, 0, 1), (7, 5, 0, 7), (63, 33, 0, 13), (63, 33, 9, 40), (64, 96, 8, 72), (12, 3, 5, 2)]
CASES = [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in WITH_UNITS]


def random_mask(rows: int, atoms: int, nonzeros: int) -> torch.Tensor:
    mask = torch.zeros(rows, atoms, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(atoms)[:nonzeros]] = True
    return mask


def case(
    inputs: int, outputs: int, learned: int, nonzeros: int, units: bool, bits: int = 16, width: int = 16, group: int = 0
) -> tuple[tuple, torch.Tensor]:
    """The arguments of the op behind x, and the dense weight, fp64, made without any code under test."""
    atoms = learned + inputs * units
    mask = random_mask(outputs, atoms, nonzeros)
    parts = [part for part in (inputs * units, learned) if part]
    if bits == 16:
        codes, scale = torch.randn(outputs, atoms) * mask, None
        values = codes[mask].view(outputs, nonzeros)
    else:
        integers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (outputs, atoms)) * mask
        values = pack_signed(integers[mask].view(outputs, nonzeros), bits)
        counts = [-(-part // (group or part)) for part in parts]
        number = [torch.arange(part) // (group or part) + sum(counts[:n]) for n, part in enumerate(parts)]
        scale = torch.randn(outputs, sum(counts))
        codes = integers * scale[:, torch.cat(number)]
    dictionary, dictionary_scale, atoms_IK = None, None, torch.zeros(inputs, 0)
    if learned and width == 16:
        dictionary = atoms_IK = torch.randn(inputs, learned)
    elif learned:
        entries = torch.randint(-(1 << width - 1), 1 << width - 1, (inputs, learned))
        dictionary, dictionary_scale = pack_signed(entries, width), torch.rand(learned)
        atoms_IK = entries * dictionary_scale
    weight = codes[:, atoms - learned :].double() @ atoms_IK.double().T
    if units:
        weight = weight + codes[:, :inputs].double()
    packed = None if nonzeros == atoms else pack_mask(mask)
    return (values, packed, scale, dictionary, dictionary_scale, units, learned, nonzeros, bits, group, width), weight


@pytest.mark.parametrize("atoms", [1, 8, 13, 40])
def test_mask_round_trip(atoms: int) -> None:
    mask = random_mask(7, atoms, max(1, atoms // 3))
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (7, -(-atoms // 8))
    assert torch.equal(unpack_mask(packed, atoms), mask)
    codes = torch.randn(7, atoms) * mask
    assert torch.equal(expand_codes(codes[mask].view(7, -1), packed, atoms), codes)


def test_bit_order_is_documented() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 9]] = True  # bit 0 of byte 0, bit 1 of byte 1
    assert pack_mask(mask).tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_product(shape: tuple, dtype: torch.dtype, bound: float) -> None:
    arguments, weight = case(*shape)
    x = torch.randn(2, 3, shape[0]).to(dtype)
    got = sparse_dictionary(x, *arguments)
    assert got.dtype == dtype and got.shape == (2, 3, shape[1])
    # measured: 2e-7 in fp32, 8e-3 in bf16
    assert (got.double() - x.double() @ weight.T).norm() <= bound * (x.double() @ weight.T).norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("shape", [(63, 33, 40, 13, False), (63, 33, 0, 13, True), (63, 33, 9, 72, True)], ids=str)
def test_product_of_integers(shape: tuple, group: int, bits: int) -> None:
    arguments, weight = case(*shape, bits=bits, width=bits, group=group)
    x = torch.randn(5, 63)
    got = sparse_dictionary(x, *arguments).double()
    assert (got - x.double() @ weight.T).norm() <= 1e-6 * (x.double() @ weight.T).norm()


@pytest.mark.parametrize("shape", [(16, 24, 8, 3, False), (16, 24, 0, 5, True), (16, 24, 4, 20, True)], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_op_contract(shape: tuple, bits: int) -> None:
    arguments, _ = case(*shape, bits=bits, width=bits)
    torch.library.opcheck(sparse_dictionary, (torch.randn(4, 16), *arguments))
