"""The packed product equals the dense one, on odd shapes and in every dtype."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.sparse_dictionary import expand_codes, pack_mask, sparse_dictionary, unpack_mask


def random_packed(inputs: int, outputs: int, atoms: int, nonzeros: int) -> tuple[torch.Tensor, ...]:
    mask = torch.zeros(outputs, atoms, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(atoms)[:nonzeros]] = True
    codes = torch.randn(outputs, atoms) * mask
    return torch.randn(inputs, atoms), codes[mask].view(outputs, nonzeros), pack_mask(mask), codes, mask


SHAPES = [(1, 1, 8, 1), (7, 5, 16, 16), (63, 33, 40, 13), (64, 96, 32, 16), (100, 1, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_round_trip(shape: tuple[int, int, int, int]) -> None:
    _, values, packed, codes, mask = random_packed(*shape)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[1], shape[2] // 8)
    assert torch.equal(unpack_mask(packed), mask)
    assert torch.equal(expand_codes(values, packed), codes)


def test_bit_order_is_documented() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 9]] = True  # bit 0 of byte 0, bit 1 of byte 1
    assert pack_mask(mask).tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_product(shape: tuple[int, int, int, int], dtype: torch.dtype, bound: float) -> None:
    dictionary, values, packed, codes, _ = random_packed(*shape)
    x = torch.randn(2, 3, shape[0]).to(dtype)
    expected = x.double() @ dictionary.double() @ codes.double().T
    got = sparse_dictionary(x, dictionary, values, packed)
    assert got.dtype == dtype and got.shape == (2, 3, shape[1])
    # measured: 2e-7 in fp32, 8e-3 in bf16
    assert (got.double() - expected).norm() <= bound * expected.norm()


def test_op_contract() -> None:
    dictionary, values, packed, _, _ = random_packed(16, 24, 8, 3)
    torch.library.opcheck(sparse_dictionary, (torch.randn(4, 16), dictionary, values, packed))


def test_atoms_must_fill_bytes() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_mask(torch.ones(2, 9, dtype=torch.bool))
