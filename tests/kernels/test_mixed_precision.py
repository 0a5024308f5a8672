"""Integers against a float simulation, and the layer against the weight it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.mixed_precision import mixed_precision, round_activation, rounded_activation
from compress.layers import build
from compress.layers.mixed_precision import column_groups, from_storage, packed_tensors, stored_gram, to_storage
from compress.quantizer import round_to_nearest

BASE = {
    "format": "mixed_precision", "in_features": 96, "out_features": 40, "bias": False, "bits": 4, "group_size": 0,
    "high_features": 0, "high_bits": 8, "heads": 0, "hadamard": False, "activation_bits": 16, "activation_groups": 1,
    "clip": 0.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "w4": {},
    "w4 groups": {"group_size": 32},
    "w3 ragged groups": {"bits": 3, "group_size": 40},
    "w2": {"bits": 2, "group_size": 16},
    "w8a8": {"bits": 8, "activation_bits": 8},
    "w4a4": {"activation_bits": 4, "clip": 2.5},
    "w4a4 groups": {"activation_bits": 4, "group_size": 32, "activation_groups": 3},
    "resq stream": {"activation_bits": 4, "high_features": 32},
    "resq heads": {"activation_bits": 4, "high_features": 12, "heads": 6, "activation_groups": 6},
    "resq hidden": {"activation_bits": 4, "hadamard": True},
    "six bits": {"activation_bits": 4, "high_features": 32, "high_bits": 6, "hadamard": True, "clip": 2.6},
    "all of it": {"bits": 5, "activation_bits": 8, "hadamard": True, "high_features": 16, "high_bits": 6, "group_size": 24},
    "odd width": {"in_features": 13, "out_features": 3, "bits": 6, "activation_bits": 8},
}


def filled(changes: dict[str, Any], weight: torch.Tensor | None = None) -> Any:
    spec = {**BASE, **changes}
    weight = torch.randn(spec["out_features"], spec["in_features"]) if weight is None else weight
    codes, scales = round_to_nearest(to_storage(spec, weight.double()).float(), column_groups(spec))
    layer = build(spec)
    layer.load_state_dict(packed_tensors(spec, codes, scales))
    layer.check(spec, dict(layer.named_buffers()))
    return layer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_integers_agree_with_a_float_simulation(case: str, tokens: int) -> None:
    layer = filled(CASES[case])
    x = torch.randn(tokens, layer.in_features) * torch.logspace(-1, 1, layer.in_features)
    want = layer.seen_input(layer.spec, x).double() @ layer.dense_weight().double().T
    got = layer(x)
    assert got.dtype == torch.float32 and got.shape == want.shape
    # measured: at most 3e-7, fp32 against fp64; few inputs that no layer rounds, or in slices that a group of the weight
    # crosses, meet the CPU kernel in 15 bits, 5e-5
    fine = layer.spec["activation_bits"] == 16 or (layer.spec["activation_groups"] > 1 and not layer.spec["group_size"])
    bound = 1e-4 if fine and tokens <= cpu.MOST_TOKENS else 1e-6
    assert (got - want).norm() < bound * want.norm()


@pytest.mark.parametrize("case", CASES)
def test_weight_survives_storage_up_to_its_bits(case: str) -> None:
    weight = torch.randn(CASES[case].get("out_features", 40), CASES[case].get("in_features", 96))
    layer = filled(CASES[case], weight)
    bits = layer.spec["bits"]
    error = float((layer.dense_weight() - weight).norm() / weight.norm())
    assert error < 1.0 * 2 ** (1 - bits)  # uniform rounding of normal weights: measured 0.48 to 0.76 times 2^(1-bits)


def test_exact_products_at_the_extremes() -> None:
    """Codes at both ends of their range over a width whose sums pass 2^24."""
    width = 4096
    spec = {**BASE, "in_features": width, "out_features": 2, "bits": 8, "activation_bits": 8}
    codes = torch.stack([torch.full((width,), -128), torch.full((width,), 127)]).to(torch.int8)
    layer = build(spec)
    layer.load_state_dict(packed_tensors(spec, codes, torch.ones(2, 1)))
    x = torch.full((1, width), 255.0)
    x[0, -1] = 0.0
    exact = torch.tensor([[-128 * 255 * (width - 1), 127 * 255 * (width - 1)]])
    assert torch.equal(layer(x), exact.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_hold_zero_and_their_extremes(bits: int) -> None:
    x = torch.tensor([[0.0, 3.0, -1.0, 2.0], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale, zero = rounded_activation(x, bits, 1)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1 and (zero >= 0).all() and (zero <= 2**bits - 1).all()
    back = round_activation(x, bits, 1)
    assert torch.equal(back == 0, x == 0)
    assert (back - x).abs().max() <= scale.max() / 2 + 1e-6
    assert torch.equal(back[1, 3], x[1, 3])


def test_slices_have_scales_of_their_own() -> None:
    x = torch.cat([torch.randn(4, 8), 100 * torch.randn(4, 8)], dim=1)
    alone, apart = round_activation(x, 4, 1), round_activation(x, 4, 2)
    assert (apart - x)[:, :8].norm() < 0.2 * (alone - x)[:, :8].norm()


@pytest.mark.parametrize("case", ["resq heads", "resq hidden", "all of it"])
def test_storage_coordinates_are_orthogonal(case: str) -> None:
    spec = {**BASE, **CASES[case]}
    x, w = torch.randn(5, 96).double(), torch.randn(3, 96).double()
    assert torch.allclose(from_storage(spec, to_storage(spec, x)), x)
    assert torch.allclose(to_storage(spec, x) @ to_storage(spec, w).T, x @ w.T)
    assert torch.allclose(stored_gram(spec, x.T @ x), to_storage(spec, x).T @ to_storage(spec, x))


@pytest.mark.parametrize(
    "changes",
    [{"bits": 9}, {"activation_bits": 3}, {"high_features": 96}, {"activation_groups": 5}, {"heads": 5}, {"clip": -1.0}],
    ids=str,
)
def test_impossible_specs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits|sizes|divide"):
        build({**BASE, **changes})


def test_codes_beyond_the_last_column_are_refused() -> None:
    layer = filled({"in_features": 13, "bits": 6})
    layer.low[1, -1] |= 0x80
    with pytest.raises(ValueError, match="beyond its 13 columns"):
        layer.check(layer.spec, dict(layer.named_buffers()))


def test_op_contract() -> None:
    layer = filled(CASES["resq stream"])
    x = torch.randn(3, 2, 96)
    arguments = (x, layer.low, layer.low_scale, layer.high, layer.high_scale, 4, 8, 32, 0, 4, 1, 1.0, True)
    torch.library.opcheck(mixed_precision, arguments)
    assert mixed_precision(*arguments).shape == (3, 2, 40)


def test_a_cut_helps_normal_numbers_and_spares_values_of_one_size() -> None:
    normal, flat = torch.randn(64, 1536), 7 * torch.randn(8, 1536).sign()
    error = {clip: (round_activation(normal, 4, 1, clip) - normal).square().mean() for clip in (0.0, 2.6)}
    assert error[2.6] < 0.8 * error[0.0]  # measured: 0.70
    bound = 2.6 * normal.square().mean(dim=-1, keepdim=True).sqrt()
    assert (round_activation(normal, 4, 1, 2.6).abs() <= 1.1 * bound).all()  # the zero is rounded: a little over
    assert torch.equal(round_activation(flat, 4, 1, 2.6), round_activation(flat, 4, 1))
