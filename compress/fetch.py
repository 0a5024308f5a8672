"""Where MODEL lies: a directory, a hub id that is downloaded, or a .gguf file that is rewritten as a directory once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from compress.errors import CompressError


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/subspace-compress`, as the desktop convention has it; made when missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-compress"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(model: str) -> Path:
    """The local directory of a model; CompressError when there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return _rewrite_gguf(path)
        raise CompressError(f"{model} is a file; expected a model directory, a hub id or a .gguf file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise CompressError(f"{model} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CompressError(f"{model} is neither a local path nor a model on the Hugging Face hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CompressError(
            f"{model} is not a local path, and the Hugging Face hub cannot be reached; give a directory or a .gguf file"
        ) from error


def _rewrite_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a bf16 safetensors directory in the cache, once per file content."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    target = cache_dir() / "gguf" / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    target.parent.mkdir(exist_ok=True)
    folder, name = path.parent, path.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, OSError) as error:
        raise CompressError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    # The loaded model carries a gguf quantization_config that forbids saving: rebuild it from a clean config.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    clean = type(loaded.config).from_dict(config)
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        inner = Path(unfinished) / "model"
        model.save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        shutil.move(inner, target)
    return target
