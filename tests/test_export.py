"""The dense copy: an ordinary bf16 checkpoint, made beside everything else without touching it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.cache.attached import CACHE_MODULE
from compress.errors import CompressError
from compress.recipe import Recipe
from compress.run import run
from compress.staging import locked
from compress.tensorfile import CastTensor, read_header, write_file
from helpers import save_tiny, tiny_recipe

IDS = torch.arange(3, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def test_a_dense_copy_is_an_ordinary_checkpoint(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.export_dense(tiny_compressed, tmp_path / "dense")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM as A
m = A.from_pretrained({str(tmp_path / "dense")!r}, dtype=torch.float32)
assert "compress" not in sys.modules
torch.save(m(torch.arange(3, 60)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    want = logits(compress.load(tiny_compressed))
    got = torch.load(tmp_path / "logits.pt")
    assert (got - want).norm() < 0.02 * want.norm()  # weights rounded to bf16
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_everything_is_bf16(tiny_compressed: Path, tmp_path: Path) -> None:
    """The source is fp32: its norms and embedding are rounded too."""
    compress.export_dense(tiny_compressed, tmp_path / "dense")
    dense, kept = load_file(tmp_path / "dense" / "model.safetensors"), load_file(tiny_compressed / "model.safetensors")
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}
    assert torch.equal(dense["model.norm.weight"], kept["model.norm.weight"].bfloat16())
    assert torch.equal(dense["model.embed_tokens.weight"], kept["model.embed_tokens.weight"].bfloat16())
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").dtype == torch.bfloat16


def test_casting_while_copying_is_the_same_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.tensorfile._CHUNK_BYTES", 64)  # several chunks
    values = torch.randn(7, 33)
    write_file(tmp_path / "a", {"x": values})
    cast = CastTensor.of(read_header(tmp_path / "a")["x"], torch.bfloat16)
    write_file(tmp_path / "b", {"x": cast})
    assert torch.equal(read_header(tmp_path / "b")["x"].read(), values.bfloat16())
    assert torch.equal(cast.read(), values.bfloat16())


def test_an_unfinished_run_of_the_same_name_survives(tiny_compressed: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / ".X.partial"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    compress.export_dense(tiny_compressed, tmp_path / "X")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".X.partial", "X"]
    assert (unfinished / "run.json").read_text() == "{}"


def test_two_exports_to_one_place(tiny_compressed: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work; what a killed one has left is cleared away."""
    with locked(tmp_path / ".X.export"), pytest.raises(CompressError, match=r"another process is at work in .*\.X\.export"):
        compress.export_dense(tiny_compressed, tmp_path / "X")
    (tmp_path / ".X.export" / "whole").mkdir(parents=True)
    (tmp_path / ".X.export" / "whole" / "model-00001-of-00002.safetensors").write_bytes(b"half of a shard")
    compress.export_dense(tiny_compressed, tmp_path / "X")
    assert not list((tmp_path / "X").glob("model-*")) and [path.name for path in tmp_path.iterdir()] == ["X"]


def test_the_place_of_the_output_is_checked_first(
    tiny_compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressError, match="a/b does not exist; make it first"):
        compress.export_dense(tiny_compressed, tmp_path / "a" / "b" / "c")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(CompressError, match="no space left"):
        compress.export_dense(tiny_compressed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards(tiny_compressed: Path, tmp_path: Path) -> None:
    compress.load(tiny_compressed).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    compress.export_dense(tiny_compressed, tmp_path / "one")
    compress.export_dense(tmp_path / "shards", tmp_path / "many", max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))


def test_untied_head(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "mistral")
    run(source, Recipe.from_dict(tiny_recipe(targets=["*down_proj", "lm_head"])), tmp_path / "out")
    compress.export_dense(tmp_path / "out", tmp_path / "dense")
    dense, model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), compress.load(tmp_path / "out")
    assert torch.equal(dense.lm_head.weight, model.lm_head.dense_weight().bfloat16())
    assert (logits(dense) - logits(model)).norm() < 0.03 * logits(model).norm()


def test_bases_of_the_cache_stay_behind(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {**tiny_recipe(), "weights": {"method": "rtn"}, "kv_cache": {"method": "per_token", "basis": "hadamard"}}
    run(tiny_llama, Recipe.from_dict(recipe), tmp_path / "out")
    assert any(name.startswith(CACHE_MODULE) for name in load_file(tmp_path / "out" / "model.safetensors"))
    compress.export_dense(tmp_path / "out", tmp_path / "dense")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
