"""The block loop gives what the model itself gives, for every family, with and without padding."""

from __future__ import annotations

import pytest
import torch

from compress.calibrate.blocks import BlockRunner
from compress.errors import CompressError
from compress.model import decoder_blocks
from helpers import FAMILIES, tiny_model

OTHERS = {
    "opt": {"word_embed_proj_dim": 32, "num_key_value_heads": None},  # embeddings narrower than the hidden states
    "bamba": {  # blocks that return two values
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    },
}  # fmt: skip


def runner_for(family: str, padded: bool) -> BlockRunner:
    model = tiny_model(family, **OTHERS.get(family, {}))
    ids = torch.randint(3, 256, (4, 24))
    mask = torch.ones(4, 24, dtype=torch.bool)
    if padded:
        mask[1, 15:] = False
        mask[2, 5:] = False
    batches = [(ids[:2], mask[:2] if padded else None), (ids[2:], mask[2:] if padded else None)]
    return BlockRunner(model, decoder_blocks(model)[1], batches, torch.device("cpu"))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_blocks_reproduce_the_model(family: str, padded: bool) -> None:
    runner = runner_for(family, padded)
    expected = []
    handle = runner.blocks[-1].register_forward_hook(
        lambda m, a, out: expected.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        for ids, mask in runner.batches:
            runner.model(ids, attention_mask=None if mask is None else mask.long(), use_cache=False)
    handle.remove()
    runner.embed()
    for index in range(len(runner.blocks)):
        runner.run(index, keep=True)
    for (_, mask), got, want in zip(runner.batches, runner.hidden, expected, strict=True):
        real = torch.ones(got.shape[:2], dtype=torch.bool) if mask is None else mask
        assert torch.allclose(got[real], want[real], atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_grams_are_those_of_the_inputs_and_shared(keep: bool) -> None:
    runner = runner_for("llama", padded=True)
    block = runner.blocks[0]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = {name: block.get_submodule(name) for name in names}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        linears[name].register_forward_pre_hook(lambda m, a, name=name: inputs[name].append(a[0][runner.mask]))
        for name in names
    ]
    runner.embed()
    runner.run(0, keep=False)
    for handle in handles:
        handle.remove()
    grams = runner.grams(0, linears, keep=keep)
    for name in names:
        x = torch.cat(inputs[name]).double()
        assert grams[name].tokens == len(x) == 24 + 15 + 5 + 24
        assert torch.allclose(grams[name].mean(), x.T @ x / len(x), atol=1e-5)
    assert grams["self_attn.q_proj"] is grams["self_attn.k_proj"]
    assert grams["mlp.gate_proj"] is grams["mlp.up_proj"]
    assert len({id(gram) for gram in grams.values()}) == 4
    if not keep:  # the same inputs again, tokens counted differently
        counts = torch.rand(4, 24)
        mask = torch.cat([mask for _, mask in runner.batches])
        weighted = runner.grams(0, linears, keep=False, weights={"mlp.down_proj": counts})
        x = torch.cat(inputs["mlp.down_proj"]).double()
        want = x.T @ (x * counts[mask].double().unsqueeze(1)) / len(x)
        assert torch.allclose(weighted["mlp.down_proj"].mean(), want, atol=1e-5)
        assert torch.equal(weighted["mlp.up_proj"].mean(), grams["mlp.up_proj"].mean())


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("leaf", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_activations_that_are_not_finite_name_the_layer(leaf: str, padded: bool) -> None:
    runner = runner_for("llama", padded)
    runner.embed()
    block = runner.blocks[0]
    block.get_submodule(leaf).weight.data.mul_(1e38).mul_(1e3)
    message = rf"hold NaN or infinite values, first in the output of model\.layers\.0\.{leaf}"
    with pytest.raises(CompressError, match=message):
        runner.run(0, keep=True)
    if leaf != "mlp.down_proj":
        with pytest.raises(CompressError, match=message):
            runner.grams(0, {"down": block.mlp.down_proj, "o": block.self_attn.o_proj}, keep=False)


def test_inputs_too_large_for_a_gram_matrix_are_named() -> None:
    runner = runner_for("llama", padded=False)
    runner.embed()
    block = runner.blocks[0]
    block.mlp.up_proj.weight.data.mul_(1e22)
    with pytest.raises(CompressError, match="inputs of down are too large"):
        runner.grams(0, {"down": block.mlp.down_proj}, keep=False)


def test_uncalled_linear_is_named() -> None:
    runner = runner_for("llama", padded=False)
    runner.embed()
    with pytest.raises(CompressError, match="spare is not called"):
        runner.grams(0, {"spare": torch.nn.Linear(2, 2)}, keep=False)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_paired_streams_meet_at_every_linear(share: float) -> None:
    """Block 0 is changed for one stream only; in block 1 each token's two inputs are known from running both models."""
    runner = runner_for("llama", padded=True)
    linear, names = runner.blocks[1].mlp.down_proj, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = {name: runner.blocks[1].get_submodule(name) for name in names}
    changed = runner.blocks[0].mlp.down_proj.weight.data
    runner.embed()
    runner.pair(share)
    runner.run_reference(0)
    before = changed.clone()
    changed.mul_(0.7)
    runner.run(0, keep=True)

    def inputs() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        with torch.inference_mode():
            for ids, mask in runner.batches:
                runner.model(ids, attention_mask=mask.long(), use_cache=False)
        handle.remove()
        return torch.cat([x[mask] for x, (_, mask) in zip(seen, runner.batches, strict=True)]).double()

    compressed = inputs()
    changed.copy_(before)
    original = inputs()
    target = compressed + share * (original - compressed)
    grams = runner.grams(1, linears, keep=True)
    assert grams["mlp.gate_proj"] is grams["mlp.up_proj"]
    gram, tokens = grams["mlp.down_proj"], len(original)
    assert torch.allclose(gram.target.mean(), target.T @ target / tokens, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gram.seen.mean(), compressed.T @ compressed / tokens, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gram.cross_II / tokens, target.T @ compressed / tokens, rtol=1e-4, atol=1e-5)
    assert (runner.hidden[0] - runner.reference[0]).abs().max() > 1e-3  # both moved on
