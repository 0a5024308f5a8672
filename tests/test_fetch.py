"""From what the user names to a directory: which files of a hub repository are downloaded, and GGUF files rewritten."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.fetch import fetch, hub_or_cache
from compress.source import open_source
from helpers import tiny_model, tiny_tokenizer

Q4 = GGMLQuantizationType.Q4_1
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository on a pretended hub; only what is asked for arrives in tmp_path/cache."""
    repository = tmp_path / "repository"
    repository.mkdir()

    def download(repo: str, allow_patterns: Any = None, ignore_patterns: Any = None) -> str:
        assert repo == "org/model"
        files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(
    answers: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside, libraries go by their cache; any answer, an error too, is a network. Outside all is as it was."""
    asked: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if answers:
        threading.Thread(target=server.handle_request, daemon=True).start()
    else:
        server.server_close()
    with hub_or_cache():
        assert is_offline_mode() != answers
        if not answers:
            with hub_or_cache():  # asks nobody
                assert is_offline_mode()
            assert is_offline_mode()
    assert not is_offline_mode()
    assert len(asked) == answers
    assert [record.message.startswith(constants.ENDPOINT) for record in caplog.records] == [True] * (not answers)
    server.server_close()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


BESIDE = ("config.json", "tokenizer.json", "LICENSE", "NOTICE.txt")
NEVER = (
    "consolidated.safetensors",
    "consolidated.00.safetensors",
    "onnx/model.safetensors",
    "original/params.json",
    "x.bin",
)


def test_only_what_transformers_would_load_is_downloaded(hub: Path) -> None:
    put(hub, *BESIDE, *NEVER, "model.safetensors", "adapter_model.safetensors")
    path = fetch("org/model")
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {*BESIDE, "model.safetensors"}


def test_the_index_names_the_shards(hub: Path) -> None:
    put(hub, *BESIDE, *NEVER, "part-1.safetensors", "part-2.safetensors", "part-3.safetensors")
    weight_map = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-2.safetensors"}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    names = {file.name for file in fetch("org/model").rglob("*.safetensors")}
    assert names == {"part-1.safetensors", "part-2.safetensors"}


REFUSALS = {
    GatedRepoError: "org/model is gated: accept its licence at https://huggingface.co/org/model, then log in",
    RepositoryNotFoundError: "neither a local path nor a model on the Hugging Face hub",
    HfHubHTTPError: "org/model: the Hugging Face hub refuses: said so",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_hub_refuses_is_told_apart(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise kind("said so", response=SimpleNamespace(status_code=403, headers={}, request=None, url="x"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CompressError, match=REFUSALS[kind]):
        fetch("org/model")


def test_a_refusal_without_a_cached_copy_is_no_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`snapshot_download` turns what the hub answers into an entry that was not found here."""

    def refuse(*_: Any, **__: Any) -> str:
        answer = HfHubHTTPError("429 said so", response=SimpleNamespace(status_code=429, headers={}, request=None, url="x"))
        raise LocalEntryNotFoundError("not cached") from answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CompressError, match="org/model: the Hugging Face hub refuses: 429 said so"):
        fetch("org/model")


def test_a_full_disk_is_no_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(OSError, match="No space left"):
        fetch("org/model")


def write_gguf(path: Path, *, without: str = "") -> torch.nn.Module:
    model, tokenizer = tiny_model("llama", intermediate_size=128, tie_word_embeddings=False), tiny_tokenizer()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_scores([0.0] * len(vocabulary))
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        prefix, block = "", module
        if module.startswith("model.layers."):
            _, _, index, block = module.split(".", 3)
            prefix = f"blk.{index}."
        stored = f"{prefix}{NAMES[block]}.weight"
        if stored == without:
            continue
        if tensor.ndim == 2:
            writer.add_tensor(stored, quantize(tensor.numpy(), Q4), raw_dtype=Q4)
        else:
            writer.add_tensor(stored, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "subspace-compress" / "gguf"


def test_a_gguf_file_becomes_a_bf16_directory_once(tmp_path: Path, cache: Path) -> None:
    original = write_gguf(tmp_path / "a.gguf")
    source = open_source(tmp_path / "a.gguf")
    assert source.path.parent == cache and "quantization_config" not in source.config
    weight = source.read("model.layers.1.mlp.up_proj.weight")
    unpacked = dequantize(quantize(original.model.layers[1].mlp.up_proj.weight.detach().numpy(), Q4), Q4)
    assert torch.equal(weight, torch.from_numpy(unpacked).bfloat16())
    assert {tensor.dtype for tensor in source.tensors.values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(source.path)
    before = source.path.stat().st_mtime_ns
    assert open_source(tmp_path / "a.gguf").path.stat().st_mtime_ns == before


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf", without="output_norm.weight")
    with pytest.raises(CompressError, match=r"a\.gguf is incomplete: it holds nothing for model.norm.weight"):
        open_source(tmp_path / "a.gguf")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("length", [0, 3, 300, -2000])
def test_a_gguf_file_cut_off_is_refused(length: int, tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[:length])
    with pytest.raises(CompressError, match=r"a\.gguf cannot be loaded"):
        open_source(tmp_path / "a.gguf")
