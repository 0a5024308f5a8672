"""ResQ and QuaRot: sizes of the parts, bits, and what the basis buys."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compress.layers import build, dense_bytes, packed_bytes
from compress.linalg import SecondMoment
from compress.methods import Site, quarot, resq
from compress.orthonormal import pca_basis
from compress.recipe import Recipe
from compress.rotation import high_channels, high_per_head
from compress.run import run

SMOLLM2 = [
    (Site(576, 576, "stream"), 1), (Site(576, 192, "stream"), 2), (Site(576, 576, "heads", 9), 1),
    (Site(576, 1536, "stream"), 2), (Site(1536, 576, "hidden"), 1),
]  # fmt: skip


def spec_of(method, site: Site, config) -> dict:
    sizes = {"in_features": site.in_features, "out_features": site.out_features, "bias": False}
    return {**method.plan(site, config), **sizes}


def test_packed_size_of_the_published_setting() -> None:
    """SmolLM2's block at 4.4 bits: at most 0.30 of its bf16 bytes, scales included."""
    specs = [(spec_of(resq, site, resq.Config(activation_bits=4)), count) for site, count in SMOLLM2]
    packed = sum(count * packed_bytes(spec) for spec, count in specs)
    dense = sum(count * dense_bytes(spec) for spec, count in specs)
    assert packed / dense < 0.28


@pytest.mark.parametrize(
    ("width", "high"), [(576, 64), (768, 96), (896, 128), (1024, 128), (2048, 256), (4096, 512), (64, 8)]
)
def test_high_channels_are_near_an_eighth_and_aligned(width: int, high: int) -> None:
    assert high_channels(width, 0.125) == high
    assert high_channels(width, 0) == 0


def test_parts_of_the_sites() -> None:
    config = resq.Config(activation_bits=4)
    stream, heads, hidden = (spec_of(resq, site, config) for site, _ in (SMOLLM2[0], SMOLLM2[2], SMOLLM2[4]))
    assert (stream["high_features"], stream["heads"], stream["activation_groups"]) == (64, 0, 1)
    assert (heads["high_features"], heads["heads"], heads["activation_groups"]) == (9 * high_per_head(64, 0.125), 9, 9)
    assert (hidden["high_features"], hidden["hadamard"]) == (0, True)
    for spec in (stream, heads, hidden):
        build(spec)
    uniform = spec_of(quarot, SMOLLM2[0][0], quarot.Config())
    assert uniform["high_features"] == 0 and not uniform["hadamard"]


def test_average_bits_count_both_parts_and_the_scales() -> None:
    """96 of 576 inputs in 6 bits and the others in 4, two scales and zeros of 24 bits; weights with two 16-bit scales."""
    spec = spec_of(resq, SMOLLM2[0][0], resq.Config(activation_bits=4, high_bits=6, high_share=1 / 6))
    assert spec["high_features"] == 96
    assert build(spec).activation_bits(spec) == pytest.approx(4 + 2 * 96 / 576 + 2 * 24 / 576)
    assert 16 * packed_bytes(spec) / dense_bytes(spec) == pytest.approx(4 + 2 * 96 / 576 + 2 * 16 / 576)
    eight = spec_of(resq, SMOLLM2[0][0], resq.Config(activation_bits=8, high_bits=6))
    assert build(eight).activation_bits(eight) == pytest.approx(8 + 2 * 24 / 576)  # never fewer than the low part


def test_heads_may_have_a_share_of_their_own() -> None:
    config = resq.Config(high_share=1 / 6, heads_high_share=0.25)
    assert resq.plan(SMOLLM2[2][0], config)["high_features"] == 9 * 16
    assert resq.rotation(config, 576, 64).heads_high == 16


def test_high_share_that_a_site_cannot_take() -> None:
    with pytest.raises(ValueError, match="high-precision channels of 8"):
        resq.plan(Site(8, 8, "stream"), resq.Config(high_share=0.5))


def test_the_basis_is_what_makes_four_bits_enough() -> None:
    """Inputs with strong directions that are no single channel: PCA with a high part, against none, at 4-bit activations."""
    mix = torch.linalg.qr(torch.randn(128, 128)).Q * torch.logspace(1.5, -0.5, 128)[:, None]
    x = torch.randn(3000, 128) @ torch.linalg.qr(torch.randn(128, 128)).Q.T @ mix
    weight = torch.randn(64, 128) / 10
    moment = (x.T @ x / len(x)).double()
    want, errors = x @ weight.T, {}
    for name, basis, config in [
        ("none", torch.eye(128).double(), resq.Config(activation_bits=4, stream_basis="none")),
        ("pca", pca_basis(moment, 16, torch.Generator().manual_seed(0)), resq.Config(activation_bits=4)),
    ]:
        spec = spec_of(resq, Site(128, 64, "stream"), config)
        rotated = (x.double() @ basis).float()
        layer = build(spec)
        inputs = SecondMoment((rotated.T @ rotated / len(x)).double())
        layer.load_state_dict(resq.compress((weight.double() @ basis).float(), inputs, spec, config))
        errors[name] = float((layer(rotated) - want).norm() / want.norm())
    assert errors["pca"] < 0.6 * errors["none"]


def test_a_killed_run_resumes_with_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """Killed while the bases are gathered and after the first block."""
    changes = ["calibration.dataset=python-docs", "calibration.samples=8", "calibration.length=64"]
    run(tiny_llama, Recipe.load("resq", changes), tmp_path / "whole")
    code = f"""
from compress.recipe import Recipe
from compress.run import run
run({str(tiny_llama)!r}, Recipe.load("resq", {changes!r}), {str(tmp_path / "out")!r})
"""
    staging = tmp_path / ".out.partial"
    killed = 0
    for mark in (staging / "run.json", staging / "bases.safetensors", staging / "block-00000.safetensors"):
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.DEVNULL)
        while process.poll() is None and not mark.exists():
            time.sleep(0.0005)
        process.kill()
        process.wait()
        killed += process.returncode == -9
    assert killed >= 2
    if not (tmp_path / "out").exists():
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_search_for_widths_has_a_budget_and_plain_inputs() -> None:
    with pytest.raises(ValueError, match="bits decides"):
        resq.Config(target_bits=4)
    with pytest.raises(ValueError, match="bits decides"):
        resq.Config(ratio=0.5)
    with pytest.raises(ValueError, match="activation_bits: 16"):
        resq.Config(allocation="search", activation_bits=4)
    site, config = SMOLLM2[0][0], resq.Config(allocation="search", high_bits=6, ratio=0.75)
    tried = resq.alternatives(site, config)
    assert [(one.bits, one.high_bits) for one in tried] == [(2, 4), (3, 5), (4, 6), (5, 7), (6, 8), (8, 8)]
    with pytest.raises(ValueError, match="rule of its own"):
        resq.plan(Site(64, 512), config)
    assert resq.alternatives(site, resq.Config()) == [resq.Config()]
