"""The matrices are Hadamard, symmetric and fixed; the transform is the product with them."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.kernels.hadamard import _base_matrix, block_order, hadamard, hadamard_matrix

# The multiples of 4 up to 1000 that are not 2^k, 2^k (q + 1) or 2^k 2 (q + 1), from a sieve of prime powers q.
UNREACHABLE = [
    *(92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508),
    *(520, 532, 536, 584, 596, 604, 612, 652, 668, 712, 716, 732, 756, 764, 772, 808, 836, 852, 856, 872, 876, 892, 904),
    *(932, 940, 944, 952, 956, 964, 980, 988, 996),
]

# Hidden and intermediate widths of SmolLM2, Qwen, Llama, Gemma and ChatGLM models; 13696 needs blocks.
WIDTHS = [576, 1536, 2560, 4864, 5632, 6912, 8960, 9728, 11008, 13696, 13824, 14336, 18944, 29568]


def dense(width: int, block: int) -> torch.Tensor:
    return torch.block_diag(*[hadamard_matrix(block).double()] * (width // block)) / block**0.5


def test_reachable_orders_up_to_256() -> None:
    orders = [1, 2, *(n for n in range(4, 257, 4) if n not in UNREACHABLE)]
    for order in [*orders, 344, 676, 924]:  # also GF(7^3), GF(337), GF(461)
        matrix = hadamard_matrix(order)
        assert matrix.dtype == torch.int8 and matrix.shape == (order, order)
        product = matrix.float() @ matrix.float().T  # integers below 2^24: exact
        assert torch.equal(product, order * torch.eye(order)), order
        assert torch.equal(matrix, matrix.T), order


def test_every_order_that_the_constructions_reach_is_found() -> None:
    assert [order for order in range(4, 1001, 4) if block_order(order) != order] == UNREACHABLE


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 13, 92, 172])
def test_unreachable_orders_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"matrix of order {order} "):
        hadamard_matrix(order)


def test_order_12_by_hand() -> None:
    squares = {0, 1, 3, 4, 5, 9}  # of GF(11), with zero
    rows = [[1, *(1 if (a + b) % 11 in squares else -1 for b in range(11))] for a in range(11)]
    assert hadamard_matrix(12).tolist() == [[-1, *[1] * 11], *rows]


@pytest.mark.parametrize(("order", "checksum"), [(28, 0x83EFE61B), (36, 0x09D15F94), (48, 0x80C343DC), (344, 0xAAAE17D4)])
def test_construction_never_changes(order: int, checksum: int) -> None:
    """Compressed weights hold one particular H; these are GF(27), GF(17), 12 kron 4 and GF(343)."""
    assert zlib.crc32(hadamard_matrix(order).numpy().tobytes()) == checksum


@pytest.mark.parametrize("width", WIDTHS)
def test_model_widths(width: int) -> None:
    assert block_order(width) == (128 if width == 13696 else width)
    x = torch.randn(3, width)
    y = hadamard(x)
    # measured: 5e-7 and 4e-7
    assert (y.norm(dim=1) / x.norm(dim=1) - 1).abs().max() <= 1e-5
    assert (hadamard(y) - x).norm() <= 1e-5 * x.norm()


SHAPES = [(12, 0), (20, 0), (28, 0), (36, 0), (48, 0), (576, 0), (64, 0), (92, 0), (7, 0), (60, 12), (96, 1), (96, 8)]


@pytest.mark.parametrize(("width", "block"), SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_op_is_the_product_with_the_matrix(width: int, block: int, dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(2, 3, width, dtype=dtype)
    before = x.clone()
    expected = x.double() @ dense(width, block or block_order(width))
    got = hadamard(x, block)
    assert got.dtype == dtype and got.shape == x.shape and torch.equal(x, before)
    # measured: 8e-16 in fp64, 2e-7 in fp32
    assert (got.double() - expected).norm() <= bound * expected.norm()


def test_merged_weight_undoes_the_transform() -> None:
    x, weight = torch.randn(5, 1536), torch.randn(7, 1536)
    expected = x @ weight.T
    assert (hadamard(x) @ hadamard(weight).T - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 576).to(dtype)
    assert torch.equal(hadamard(x), hadamard(x.float()).to(dtype))


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 14336)
    x[0, 77] = 100.0
    torch.testing.assert_close(hadamard(x).abs(), torch.full_like(x, 100 / 14336**0.5))


@pytest.mark.parametrize(("shape", "block"), [((4, 48), 0), ((4, 48), 12), ((4, 64), 0), ((0, 48), 0), ((48,), 16)], ids=str)
def test_op_contract(shape: tuple[int, ...], block: int) -> None:
    x = torch.randn(shape)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2] if x.ndim == 1 else x.T.contiguous().T
    torch.library.opcheck(hadamard, (x, block))
    torch.library.opcheck(hadamard, (strided, block))
    assert hadamard(strided, block).is_contiguous()  # as the fake says
    assert torch.equal(hadamard(strided, block), hadamard(x, block))


def test_matrices_are_real_whatever_is_being_built() -> None:
    _base_matrix.cache_clear()
    with torch.device("meta"):
        assert hadamard_matrix(28).device.type == "cpu"
    with FakeTensorMode():
        assert hadamard(torch.empty(2, 28)).shape == (2, 28)
    x = torch.randn(2, 28)
    with torch.inference_mode():
        first = hadamard(x)
    assert torch.equal(hadamard(x), first)


def test_wrong_inputs_are_named() -> None:
    for block in (8, 3, -4):  # does not divide, is not reachable, is not an order
        with pytest.raises(ValueError, match=f"order {block} for width 12; .* gives 12"):
            hadamard(torch.randn(2, 12), block)
    with pytest.raises(ValueError, match="positive width"):
        block_order(0)
    with pytest.raises(TypeError, match="floating point"):
        hadamard(torch.ones(2, 12, dtype=torch.int32))
