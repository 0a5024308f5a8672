"""What may lie in a checkpoint directory: complete ones load, every other costs one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.card import card
from compress.checkpoint import read_report
from compress.errors import CompressError
from compress.export import export_dense
from compress.prepare import prepare
from compress.recipe import Recipe
from compress.run import run
from compress.source import open_source
from helpers import save_tiny, tiny_model, tiny_recipe, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj"


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage: `change` is applied to the parsed config.json."""

    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return damage


def edit_modules(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit_config(lambda config: change(config["quantization_config"]["modules"]))


def edit_spec(**changes: object) -> Callable[[Path], None]:
    return edit_modules(lambda modules: modules[UP].update(changes))


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


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage: `change` is applied to the parsed header of the weight file; what it returns, if anything, replaces it."""

    def damage(path: Path) -> None:
        raw = (path / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def edit_entry(**changes: object) -> Callable[[Path], None]:
    return edit_header(lambda header: header["model.norm.weight"].update(changes))


def index_only(content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "model.safetensors").rename(path / "shard.safetensors")
        write("model.safetensors.index.json", content)(path)

    return damage


def shift(by: float) -> Callable[[dict[str, Any]], None]:
    """Move the last tensor's bytes in the header, leaving a gap or an overlap."""

    def change(header: dict[str, Any]) -> None:
        last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
        last["data_offsets"] = [last["data_offsets"][0] + by, last["data_offsets"][1] + by]

    return change


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
        edit_modules(lambda modules: modules.pop(UP)),
        f"incomplete: {UP}.weight is missing",
    ),
    "one tensor more": (edit_tensors(lambda t: t.update(extra=torch.ones(3))), "extra is in its files.* has no place"),
    "integer norm": (edit_tensor("model.norm.weight", lambda t: t.long()), "a floating point tensor is expected"),
    "norm shape": (edit_tensor("model.norm.weight", lambda t: t[1:]), r"model.norm.weight is \[63\]"),
    "vocabulary": (edit_config(lambda c: c.update(vocab_size=300)), r"asks for \[300, 64\]"),
    "float size": (edit_spec(num_atoms=40.0), r"num_atoms is 40\.0, expected a whole number"),
    "true as size": (edit_spec(num_nonzeros=True), "num_nonzeros is True, expected a whole number"),
    "text as size": (edit_spec(in_features="64"), "in_features is '64', expected a whole number"),
    "negative size": (edit_spec(out_features=-96), "out_features is -96, expected a whole number"),
    "null size": (edit_spec(num_atoms=None), "num_atoms is None, expected a whole number"),
    "huge size": (edit_spec(num_atoms=10**30), "expected a whole number from 0 to"),
    "unknown key": (edit_spec(scale=1), "scale missing or unknown"),
    "no such dtype": (edit_spec(bias="nn"), "bias is 'nn', expected false or a floating point dtype"),
    "integer bias": (edit_spec(bias="int8"), "bias is 'int8', expected false or a floating point dtype"),
    "true as bias": (edit_spec(bias=True), "bias is True, expected false"),
    "list as format": (edit_spec(format=["low_rank"]), "unknown storage format"),
    "no format": (edit_modules(lambda modules: modules[UP].pop("format")), "unknown storage format None"),
    "number as spec": (edit_modules(lambda modules: modules.update({UP: 5})), "expected a mapping, got 5"),
    "config list": (write("config.json", "[]"), "config.json holds a list"),
    "config text": (write("config.json", "hello"), "config.json is not valid JSON"),
    "config bytes": (write("config.json", b"\xff\xfe"), "config.json is not valid JSON"),
    "config deep": (write("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "no config": (lambda path: (path / "config.json").unlink(), "holds no config.json"),
    "quantization text": (edit_config(lambda c: c.update(quantization_config="x")), "not a compressed checkpoint"),
    "quantization list": (edit_config(lambda c: c.update(quantization_config=["x"])), "not a compressed checkpoint"),
    "other version": (edit_config(lambda c: c["quantization_config"].update(version=2)), "checkpoint format 2"),
    "cache": (edit_config(lambda c: c["quantization_config"].update(kv_cache=[3])), "kv_cache is damaged"),
    "no heads": (edit_config(lambda c: c.update(num_attention_heads=0)), "cannot be loaded"),
    "negative width": (edit_config(lambda c: c.update(hidden_size=-5)), "cannot be loaded"),
    "text as width": (edit_config(lambda c: c.update(hidden_size="wide")), "cannot be loaded"),
    "unknown model": (edit_config(lambda c: c.update(model_type="llamma")), "cannot be loaded"),
    "blocks as text": (edit_config(lambda c: c.update(num_hidden_layers="3")), "asks for '3' blocks"),
    "header list": (edit_header(lambda _: [1, 2]), "header is not valid"),
    "header deep": (edit_header(lambda _: b"[" * 100_000), "header is not valid"),
    "header entry": (edit_header(lambda h: h.update({"model.norm.weight": 3})), "header is not valid"),
    "metadata": (edit_header(lambda h: h.update(__metadata__=5)), "header is not valid"),
    "shape of null": (edit_entry(shape=[None]), "header is not valid"),
    "shape of text": (edit_entry(shape="ab"), "header is not valid"),
    "shape of floats": (edit_entry(shape=[64.0]), "header is not valid"),
    "negative shape": (edit_entry(shape=[-64]), "header is not valid"),
    "dtype list": (edit_entry(dtype=["BF16"]), "header is not valid"),
    "dtype unknown": (edit_entry(dtype="BF17"), "dtype BF17 is not supported"),
    "offsets of text": (edit_entry(data_offsets="ab"), "header is not valid"),
    "float offsets": (edit_header(shift(0.0)), "header is not valid"),
    "gap": (edit_header(shift(2)), "does not begin where the one before it ends"),
    "overlap": (edit_header(shift(-2)), "does not begin where the one before it ends"),
    "tensor left out": (
        edit_header(lambda h: h.__delitem__("model.norm.weight")),
        "does not begin where|bytes behind the last",
    ),
    "more bytes": (lambda path: (path / "model.safetensors").open("ab").write(b"more"), "4 bytes behind the last tensor"),
    "index empty": (index_only("{}"), "index.json is damaged"),
    "index list": (index_only("[]"), "index.json holds a list"),
    "index of numbers": (index_only('{"weight_map": {"model.norm.weight": 3}}'), "index.json is damaged"),
    "index of nothing": (index_only('{"weight_map": {}}'), "the files hold 0"),
    "index outside": (index_only('{"weight_map": {"model.norm.weight": "../shard.safetensors"}}'), "lacks the shard"),
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


def test_a_dense_directory_is_not_loaded_as_a_compressed_one(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"not a compressed checkpoint.*AutoModelForCausalLM"):
        compress.load(save_tiny(tmp_path / "model"))


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


def test_what_goes_along_with_the_weights(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    along = {"LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.json", "generation_config.json"}
    behind = {"pytorch_model.bin.index.json", "adapter_config.json", "model.safetensors.index.json", "README.md", "x.bin"}
    for name in {"LICENSE", "LICENSE.txt", "NOTICE"} | behind:
        write(name, "{}")(model)
    copied = {path.name for path in open_source(model).side_files()}
    assert along <= copied and not behind & copied
    (model / "additional_chat_templates").mkdir()
    write("additional_chat_templates/tool_use.jinja", "{{ messages }}")(model)
    run(model, Recipe.from_dict({**tiny_recipe(), "weights": {"method": "rtn"}}), tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "dense")
    for made in (tmp_path / "out", tmp_path / "dense"):
        assert (made / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("change", [lambda config: config.pop("dtype"), lambda config: config.update(dtype=None)])
def test_a_dtype_that_the_config_does_not_name_is_that_of_the_weights(change: Callable, tmp_path: Path) -> None:
    """Not that of the first tensor, which may be a basis of the cache."""
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    edit_config(change)(tmp_path / "model")
    cache = {"method": "per_token", "basis": "hadamard"}
    run(
        tmp_path / "model",
        Recipe.from_dict({**tiny_recipe(), "weights": {"method": "rtn"}, "kv_cache": cache}),
        tmp_path / "out",
    )
    assert compress.load(tmp_path / "out").dtype == torch.bfloat16


UNUSUAL = {
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_models_that_initialise_the_weights_of_their_linears(family: str, tmp_path: Path) -> None:
    """Mamba 2 and RecurrentGemma look for `.weight` of a packed layer while they are loaded."""
    source = save_tiny(tmp_path / "model", family, **UNUSUAL[family])
    run(source, Recipe.from_dict({**tiny_recipe(), "weights": {"method": "rtn", "bits": 8}}), tmp_path / "out")
    ids, model = torch.arange(3, 40)[None], compress.load(tmp_path / "out")
    with torch.inference_mode():
        want, got = AutoModelForCausalLM.from_pretrained(source)(ids).logits, model(ids).logits
    assert torch.linalg.norm(got - want) < 0.1 * torch.linalg.norm(want)
    assert not any("_init_weights" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name, base", [("org/model-1.5B", True), ("gpt2", True), ("/tmp/x/model", False), ("a b", False)])
def test_only_a_hub_id_is_a_base_model(name: str, base: bool, tiny_compressed: Path) -> None:
    report = replace(read_report(tiny_compressed), model=name)
    assert (f"base_model: {name}\n" in card(report)) == base and ("base_model" in card(report)) == base
    assert "base_model" not in (tiny_compressed / "README.md").read_text()
    assert "`recipe.yaml` repeats the run, `report" in card(report)
    given = card(replace(report, calibration={**report.calibration, "origin": "3 given texts"}))
    assert "repeats the run, with 3 given texts in place of its data set, `report" in given


def test_a_local_directory_is_no_hub_id(tiny_compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert "base_model" not in card(replace(read_report(tiny_compressed), model="models/tiny"))
