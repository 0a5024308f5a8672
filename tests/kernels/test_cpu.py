"""The C++ kernels against the references, on odd shapes, every width and around every boundary of the number of tokens."""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.hadamard import hadamard, hadamard_reference
from compress.kernels.mixed_precision import (
    dequantize_part,
    mixed_precision,
    mixed_precision_reference,
    round_activation,
    rounded_activation,
)
from compress.kernels.pack import pack_signed, unpack_signed
from compress.kernels.part import Part
from compress.kernels.sparse_dictionary import (
    pack_mask,
    sparse_dictionary,
    sparse_dictionary_cpu,
    sparse_dictionary_reference,
)
from compress.layers import build
from compress.linalg import largest_per_row
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
        got = cpu.integer_linear(x, [Part(packed, scale, bits, 0, width, group)])
        # half a step of 15 bits for every input, and fp32, in which the offsets of the codes are taken off
        bound = x.abs().amax(dim=1, keepdim=True).double() * weight.abs().sum(dim=1) / 65534 * 1.02
        bound += x.abs().sum(dim=1, keepdim=True).double() * scale.abs().amax(dim=1).double() * (1 << bits) * 2**-22
        assert ((got - x.double() @ weight.T).abs() <= bound).all()


def test_arguments_are_declared_as_they_are() -> None:
    source = "".join(file.read_text() for file in cpu._SOURCES)
    declared = dict(re.findall(r'extern "C" \w+ (\w+)\((.*?)\) \{', source, re.DOTALL))
    assert declared.keys() == cpu._FUNCTIONS.keys()
    for name, arguments in declared.items():
        kinds = ["p" if "*" in one else "l" if one.split()[0] == "long" else "i" for one in arguments.split(",")]
        assert "".join(kinds) == cpu._FUNCTIONS[name], name


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tail", [0, 7, 8, 31])
def test_integers_stay_exact(bits: int, tail: int) -> None:
    """Inputs that are integers with a range of 255 are their own codes: int32 sums, one product with the scales."""
    width = (2048 if bits < 6 else 256) + tail  # sums below 2^24, which fp32 holds
    packed, scale = packed_case(5, width, bits, 0)
    x = torch.randint(-100, 156, (3, width)).float()
    x[:, 0], x[:, -1] = -100, 155
    got = cpu.integer_linear(x, [Part(packed, torch.ones_like(scale), bits, 0, width, 0, seen_bits=8)])
    assert torch.equal(got.double(), x.double() @ unpack_signed(packed, bits, width).double().T)


@pytest.mark.parametrize(
    ("width", "slices", "group"),
    [(96, 1, 0), (96, 1, 40), (96, 4, 0), (96, 2, 24), (100, 5, 0), (96, 4, 40), (37, 1, 0), (1, 1, 0)],
)
@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rounded_inputs(width: int, slices: int, group: int, clip: float, bits: int) -> None:
    """Unit vectors read back what the inputs were rounded to, with rows of zeros, of one sign and of outliers."""
    x = torch.randn(6, width + 5)[:, 3 : 3 + width]
    x[1], x[2], x[3], x[4, 0] = 0, x[2].abs(), -x[3].abs(), 1e20
    packed, scale = pack_signed(torch.eye(width).int(), 4), torch.ones(width, -(-width // (group or width))).bfloat16()
    part = Part(packed, scale, 4, 0, width, group, bits, slices, clip)
    got, want = cpu.integer_linear(x, [part]), round_activation(x, bits, slices, clip)
    step = rounded_activation(x, bits, slices, clip)[1].repeat_interleave(width // slices, dim=1)
    # offsets of 8 times the sum of the inputs are taken off in fp32. The mean square is added up in another order, which
    # moves a clipped range a little and can move a code by one. Groups across slices take 15 bits of what was rounded
    bound = 8 * want.abs().sum(dim=1, keepdim=True) * 2**-21
    if slices > 1 and (width // slices) % (group or width):
        bound = bound + want.abs().amax(dim=1, keepdim=True) / 65534
    assert ((got - want).abs() <= bound + (step if clip else 0)).all()


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_with_strides_and_none_at_all(activation_bits: int, dtype: torch.dtype) -> None:
    packed, scale = packed_case(9, 40, 4, 0)
    arguments = (packed, scale, None, None, 4, 8, 0, 0, activation_bits, 1, 0.0, False)
    for x in (torch.randn(40, 5).to(dtype).T, torch.randn(5, 80).to(dtype)[:, ::2], torch.randn(2, 0, 40).to(dtype)):
        want = mixed_precision_reference(x.contiguous(), *arguments)
        got = mixed_precision(x, *arguments)
        assert got.shape == want.shape == (*x.shape[:-1], 9)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()) if want.numel() else 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_what_is_not_finite_spoils_its_token_alone(value: float, clip: float) -> None:
    low, low_scale = packed_case(9, 40, 4, 0)
    x = torch.randn(3, 40)
    x[1, 17] = value
    for activation_bits in (4, 16):
        got = mixed_precision(x, low, low_scale, None, None, 4, 8, 0, 0, activation_bits, 1, clip, False)
        assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


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
    arguments = (low, low_scale, high, high_scale, 4, 6, 24, 32, activation_bits, 1, 0.0, False)
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


@pytest.mark.parametrize(("width", "block"), [(8, 0), (96, 8), (4096, 0), (28 * 64, 0), (3 * 192, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_transform_is_that_of_the_reference(width: int, block: int, dtype: torch.dtype) -> None:
    """For no token and many, from tensors with strides. Powers of two: the same sums in the same order, to the last bit."""
    for tokens in (0, 1, 5):
        wide = torch.randn(tokens, 2 * width).to(dtype)
        for x in (wide[:, ::2], wide[:, width:]):
            got, want = hadamard(x, block), hadamard_reference(x, block)
            if width in (28 * 64, 3 * 192):  # the products with H_28 and H_12 are added up in another order
                torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
            else:
                assert torch.equal(got, want)


LAYERS = {
    "mixed_precision": {
        "bits": 4, "group_size": 32, "high_features": 0, "high_bits": 8, "heads": 0, "hadamard": False,
        "activation_bits": 16, "activation_groups": 1, "clip": 0.0,
    },
    "sparse_dictionary": {
        "unit_atoms": True, "num_atoms": 0, "num_nonzeros": 20, "value_bits": 4, "dictionary_bits": 16, "group_size": 32,
        "balance": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_inputs_of_another_width_and_are_replicated(name: str) -> None:
    layer = build({"format": name, "in_features": 64, "out_features": 24, "bias": "float32", **LAYERS[name]})
    for tensor in layer.state_dict().values():
        tensor.normal_() if tensor.is_floating_point() else tensor.random_(0, 256)
    if name == "sparse_dictionary":
        layer.mask.copy_(pack_mask(largest_per_row(torch.rand(24, 64), 20)))
    for width in (32, 96):
        with pytest.raises(ValueError, match="expected 64 inputs"):
            layer(torch.randn(3, width))
    replica, x = layer._replicate_for_data_parallel(), torch.randn(3, 64)
    for key, tensor in layer.state_dict().items():  # as torch.nn.parallel.replicate leaves them
        setattr(replica, key, tensor)
    assert torch.equal(replica(x), layer(x))


@pytest.mark.parametrize("bits", [3, 4, 16])
def test_products_by_blocks_of_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens: a weight of 33 rows in blocks of 8 is the same function; the last block holds one row."""
    (values, mask, scale, dictionary, *rest), _ = case(64, 33, 9, 40, True, bits=bits, group=16 if bits < 16 else 0)
    stored = (values if bits < 16 else values.bfloat16(), mask, None if scale is None else scale.bfloat16())
    sparse, x = (*stored, dictionary.bfloat16(), *rest), torch.randn(40, 64)
    low, low_scale = packed_case(33, 64, bits, 16) if bits < 16 else (None, None)
    monkeypatch.setattr(cpu, "_SCRATCH_BYTES", 0)
    assert relative(sparse_dictionary(x, *sparse), sparse_dictionary_reference(x, *sparse)) < 1e-6  # 2e-7
    if bits < 16:
        integers = (low, low_scale, None, None, bits, 8, 0, 16, 16, 1, 0.0, False)
        assert relative(mixed_precision(x, *integers), mixed_precision_reference(x, *integers)) < 1e-6


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize(
    "flags", [("-march=x86-64",), ("-march=x86-64-v3", "-D__znver2__")], ids=["no vectors", "slow pdep"]
)
def test_other_processors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this processor does not choose: the loops without vector instructions, and codes cut out without pdep."""
    monkeypatch.setattr(cpu, "_FLAGS", (*(flag for flag in cpu._FLAGS if flag != "-march=native"), *flags))
    cpu.compiled.cache_clear()
    try:
        for bits in WIDTHS:
            test_integer_product(bits, 100, 40)
            test_integers_stay_exact(bits, 31)
            test_expanded_is_the_weight_and_nothing_else(bits, 100, 40)
        for bits in (2, 5, 16):
            for tokens in (1, 3, 17):
                test_sparse_dictionary((63, 33, 0, 13, True), bits, tokens)
                test_sparse_dictionary((64, 33, 9, 40, True), bits, tokens)
        test_rounded_inputs(96, 1, 40, 1.5, 4)
    finally:
        monkeypatch.undo()
        cpu.compiled.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.compiled.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    low, low_scale = packed_case(8, 32, 4, 0)
    arguments = (low, low_scale, None, None, 4, 8, 0, 0, 16, 1, 0.0, False)
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


@pytest.mark.parametrize("tokens", [4, 40])
def test_torchs_defaults_do_not_matter(tokens: int) -> None:
    """C++ writes fp32 into what it is given."""
    low, low_scale = packed_case(33, 64, 4, 16)
    integers = (low, low_scale, None, None, 4, 8, 0, 16, 16, 1, 0.0, False)
    (values, mask, scale, dictionary, *rest), _ = case(64, 33, 9, 40, True)
    sparse, x = (values.bfloat16(), mask, scale, dictionary.bfloat16(), *rest), torch.randn(tokens, 64)
    want = mixed_precision(x, *integers), sparse_dictionary(x, *sparse)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = mixed_precision(x, *integers), sparse_dictionary(x, *sparse)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("code", [-128, 127])
def test_sums_of_like_signs_fit(code: int) -> None:
    """The largest codes of a weight and of inputs, all of one sign, in a segment as long as they come."""
    mask = torch.ones(2, 1024, dtype=torch.bool)
    mask[:, ::64] = False
    nonzeros = int(mask[0].sum())
    values = pack_signed(torch.full((2, nonzeros), code), 8)
    stored = (values, pack_mask(mask), torch.ones(2, 1).bfloat16(), None, None, True, 0, nonzeros, 8, 0, 16)
    assert torch.allclose(sparse_dictionary(torch.ones(1, 1024), *stored), torch.full((1, 2), float(code * nonzeros)))


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("units", [False, True])
def test_learned_atoms_under_autocast(units: bool, tokens: int) -> None:
    (values, mask, _, dictionary, *rest), _ = case(64, 33, 40, 13, units)
    stored, x = (values.bfloat16(), mask, None, dictionary.bfloat16(), *rest), torch.randn(tokens, 64)
    want = sparse_dictionary(x, *stored)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            relative(sparse_dictionary_cpu(x, *stored), want) < 1e-2 and relative(sparse_dictionary(x, *stored), want) < 1e-2
        )


def test_without_a_home_they_are_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that nobody else can write to."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cpu._folder("kernels.so")
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="written by others"):
        cpu._folder("kernels.so")
    folder.rename(tmp_path / "mine").chmod(0o700)
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(PermissionError, match="written by others"):
        cpu._folder("kernels.so")


def test_a_library_that_is_cut_off_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_bytes(b"")
    assert hasattr(cpu._built(tmp_path / "kernels.so", "c++"), "integer_linear")
