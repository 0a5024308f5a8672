"""The C++ kernels against the references, on odd shapes, every width and around every boundary of the number of tokens."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.mixed_precision import dequantize_part, mixed_precision, mixed_precision_reference
from compress.kernels.pack import pack_signed
from compress.kernels.sparse_dictionary import sparse_dictionary, sparse_dictionary_reference
from kernels.test_sparse_dictionary import case

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
TOKENS = [1, 2, 3, 4, 5, 8, 16, 17]
WIDTHS = [2, 3, 4, 5, 6, 7, 8]


def packed_case(rows: int, width: int, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, width))
    codes[0], codes[-1] = -half, half - 1
    scale = torch.randn(rows, -(-width // (group or width))).bfloat16()
    return pack_signed(codes, bits), scale


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("width", "group"), [(1, 0), (31, 0), (96, 32), (100, 40), (576, 128), (4100, 0)], ids=str)
def test_integer_product(bits: int, width: int, group: int) -> None:
    packed, scale = packed_case(7, width, bits, group)
    weight = dequantize_part(packed, scale, bits, width, group).double()
    for tokens in TOKENS:
        x = torch.randn(tokens, width) * torch.logspace(-2, 2, width)
        got = cpu.integer_product(cpu.arranged(x, group or width, bits), group or width, packed, scale, bits, group)
        # half a step of 15 bits for every input, and fp32
        bound = x.abs().amax(dim=1, keepdim=True).double() * weight.abs().sum(dim=1) / 65534 * 1.02
        assert ((got - x.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_stay_exact(bits: int) -> None:
    """Inputs that are integers already, at both ends of their range: int32 sums, one product with the scales."""
    width = 2048 if bits < 6 else 256  # sums below 2^24, which fp32 holds
    packed, scale = packed_case(5, width, bits, 0)
    scale = torch.ones_like(scale)
    x = torch.randint(-255, 256, (3, width)).float()
    x[0] = 255
    inputs = cpu.arranged(x, width, bits, torch.ones(3, 1))
    got = cpu.integer_product(inputs, width, packed, scale, bits, 0)
    assert torch.equal(got.double(), x.double() @ dequantize_part(packed, scale, bits, width, 0).double().T)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("width", "group"), [(13, 0), (100, 40), (100, 20), (64, 4)], ids=str)
def test_expanded_is_the_weight_and_nothing_else(bits: int, width: int, group: int) -> None:
    packed, scale = packed_case(5, width, bits, group)
    poisoned = torch.full((5, width + 6), torch.nan)
    cpu.expanded(packed, scale, bits, group, poisoned[:, 3 : 3 + width])
    assert torch.equal(poisoned[:, 3 : 3 + width], dequantize_part(packed, scale, bits, width, group))
    assert poisoned[:, :3].isnan().all() and poisoned[:, 3 + width :].isnan().all()


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision(activation_bits: int, tokens: int, dtype: torch.dtype) -> None:
    (low, low_scale), (high, high_scale) = packed_case(40, 96, 4, 32), packed_case(40, 24, 6, 0)
    high_scale = high_scale[:, :1]
    x = torch.randn(2, tokens, 120).to(dtype)[:1]
    arguments = (low, low_scale, high, high_scale, 4, 6, 24, 32, activation_bits, 1, 0.0)
    want, got = mixed_precision_reference(x, *arguments), mixed_precision(x, *arguments)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative(got, want) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [2, 4, 5, 8, 16])
@pytest.mark.parametrize(
    "shape", [(64, 33, 40, 13, False), (63, 33, 0, 13, True), (64, 33, 9, 40, True), (64, 33, 0, 64, True)], ids=str
)
def test_sparse_dictionary(shape: tuple, bits: int, tokens: int) -> None:
    arguments, _ = case(*shape, bits=bits, group=16 if bits < 16 else 0)
    values, mask, scale, dictionary, *rest = arguments
    stored = (values if bits < 16 else values.bfloat16(), mask, None if scale is None else scale.bfloat16())
    arguments = (*stored, None if dictionary is None else dictionary.bfloat16(), *rest)
    x = torch.randn(tokens, shape[0])
    assert relative(sparse_dictionary(x, *arguments), sparse_dictionary_reference(x, *arguments)) < 1e-4


def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.compiled.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    low, low_scale = packed_case(8, 32, 4, 0)
    arguments = (low, low_scale, None, None, 4, 8, 0, 0, 16, 1, 0.0)
    x = torch.randn(2, 32)
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found"):
            got = mixed_precision(x, *arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(got, mixed_precision(x, *arguments))
    finally:
        monkeypatch.undo()
        cpu.compiled.cache_clear()
    assert torch.equal(got, mixed_precision_reference(x, *arguments))
