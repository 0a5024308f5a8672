"""What may lie in a checkpoint directory: complete ones load, every other costs one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError
from compress.prepare import prepare
from compress.recipe import Recipe
from helpers import save_tiny, tiny_recipe

UP = "model.layers.1.mlp.up_proj"


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage: `change` is applied to the parsed config.json."""

    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return damage


def edit_spec(**changes: object) -> Callable[[Path], None]:
    return edit_config(lambda config: config["quantization_config"]["modules"][UP].update(changes))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-999])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "damaged"),
    "no header": (write("model.safetensors", b"12345678not json"), "damaged"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "holds no model.safetensors"),
    "wrong shape": (edit_tensor(f"{UP}.values", lambda t: t[:, 1:]), "asks for"),
    "wrong dtype": (edit_tensor(f"{UP}.dictionary", lambda t: t.float()), "asks for"),
    "mask bits": (edit_tensor(f"{UP}.mask", lambda t: t ^ 1), r"bits set, but \d+ values"),
    "absurd sizes": (edit_spec(num_atoms=8 * 10**5), "asks for"),
    "impossible sizes": (edit_spec(num_nonzeros=-1), "damaged"),
    "other width": (edit_spec(in_features=65), "asks for"),
    "unknown format": (edit_spec(format="os"), "unknown storage format"),
    "no norm": (edit_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "no embedding": (
        edit_tensors(lambda t: t.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight is missing",
    ),
    "one block more": (edit_config(lambda c: c.update(num_hidden_layers=4)), "asks for 4 blocks .*the files hold 3"),
    "many blocks more": (edit_config(lambda c: c.update(num_hidden_layers=10**9)), "the files hold 3"),
    "one block less": (
        edit_config(lambda c: c.update(num_hidden_layers=2)),
        "names model.layers.2.self_attn.q_proj, which this architecture does not have",
    ),
    "no modules": (edit_config(lambda c: c["quantization_config"].update(modules={})), "is incomplete"),
    "list of modules": (edit_config(lambda c: c["quantization_config"].update(modules=[])), "modules is missing"),
    "one module lost": (
        edit_config(lambda c: c["quantization_config"]["modules"].pop(UP)),
        f"incomplete: {UP}.weight is missing",
    ),
    "one tensor more": (edit_tensors(lambda t: t.update(extra=torch.ones(3))), "extra is in its files.* has no place"),
    "integer norm": (edit_tensor("model.norm.weight", lambda t: t.long()), "a floating point tensor is expected"),
    "norm shape": (edit_tensor("model.norm.weight", lambda t: t[1:]), r"model.norm.weight is \[63\]"),
    "vocabulary": (edit_config(lambda c: c.update(vocab_size=300)), r"asks for \[300, 64\]"),
}


@pytest.fixture
def copied(tiny_compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_compressed, tmp_path / "copied"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused(kind: str, copied: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(copied)
    with pytest.raises(CompressError, match=message):
        compress.load(copied)
    with pytest.raises(CompressError, match=message):
        compress.export_dense(copied, copied.with_name("dense"))
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_what_is_checked_is_what_is_loaded(tiny_compressed: Path, copied: Path) -> None:
    """transformers loads model.safetensors when there is an index too."""
    compress.load(tiny_compressed).save_pretrained(copied, max_shard_size="100KB")
    assert (copied / "model.safetensors.index.json").is_file() and (copied / "model.safetensors").is_file()
    edit_tensor(f"{UP}.mask", lambda mask: mask ^ 1)(copied)
    for load in (compress.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CompressError, match="bits set"):
            load(copied)
    (copied / "model.safetensors").unlink()
    compress.load(copied)


SOURCES = {
    "no norm": (edit_tensors(lambda t: t.pop("model.norm.weight")), "incomplete: model.norm.weight is missing"),
    "fewer blocks": (edit_config(lambda c: c.update(num_hidden_layers=2)), "layers.2.* no place; check its num_hidden"),
    "more blocks": (edit_config(lambda c: c.update(num_hidden_layers=5)), "asks for 5 blocks"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_incomplete_models_are_not_compressed(kind: str, tmp_path: Path) -> None:
    damage, message = SOURCES[kind]
    damage(save_tiny(tmp_path / "model"))
    with pytest.raises(CompressError, match=message):
        prepare(tmp_path / "model", Recipe.from_dict(tiny_recipe()))


def test_tensors_that_the_model_has_no_place_for_are_left_out(tmp_path: Path) -> None:
    edit_tensors(lambda tensors: tensors.update(extra=torch.ones(3)))(save_tiny(tmp_path / "model"))
    prepared = prepare(tmp_path / "model", Recipe.from_dict(tiny_recipe()))
    assert "extra" not in prepared.source.tensors and any("extra" in note for note in prepared.plan.notes)
