"""Where MODEL lies: a directory, a hub id that is downloaded, or a .gguf file that is rewritten as a directory once."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compress.errors import CompressError, readable_errors
from compress.jsonfile import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates/*.jinja"
_PATIENCE = 10.0  # seconds
_ONE_AT_A_TIME = threading.RLock()
_log = logging.getLogger(__name__)
_SIDE_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]


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
    return _download(model)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Asks once whether the hub answers at all. Where it does not, its libraries take what they have without delay, as under
    `HF_HUB_OFFLINE=1`; left alone, each retries every file for half a minute and prints a dozen lines before it does.
    Other threads wait: that setting is the whole process's."""
    from huggingface_hub import constants, get_session

    with _ONE_AT_A_TIME:
        before = constants.HF_HUB_OFFLINE
        try:
            if not before:
                get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        except Exception as error:  # noqa: BLE001 - of whichever HTTP client huggingface_hub has
            _log.warning("%s does not answer (%s): going by what the cache has", constants.ENDPOINT, error)
            constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def _download(model: str) -> Path:
    """The weights that transformers would load, and what lies beside them; nothing in other formats, of folders only chat
    templates."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    def get(patterns: list[str], ignored: str) -> Path:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=[ignored]))

    try:
        with hub_or_cache():
            path = get(_SIDE_FILES, "*/*")
            shards = sorted(set(weight_map(path).values())) if (path / INDEX).is_file() else []
            return get([*([WEIGHTS, *shards] if shards else ["model*.safetensors"]), TEMPLATES], "*/*.safetensors")
    except GatedRepoError as error:  # is a RepositoryNotFoundError
        raise CompressError(
            f"{model} is gated: accept its licence at https://huggingface.co/{model}, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CompressError(f"{model} is neither a local path nor a model on the Hugging Face hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # it answered, and nothing is cached
            raise CompressError(_refused(model, error.__cause__)) from error
        raise CompressError(
            f"{model} is not a local path, and the Hugging Face hub cannot be reached; give a directory or a .gguf file"
        ) from error
    except HfHubHTTPError as error:  # a full disk and the like are OSErrors, too, and say what they are
        raise CompressError(_refused(model, error)) from error


def _refused(model: str, error: Exception) -> str:
    return f"{model}: the Hugging Face hub refuses: {' '.join(str(error).split())[:200]}"


def _rewrite_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a bf16 safetensors directory in the cache, once per file content."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    target = cache_dir() / "gguf" / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    target.parent.mkdir(exist_ok=True)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with readable_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
        )
    if report["missing_keys"]:  # transformers has filled them with random numbers
        raise CompressError(f"{path} is incomplete: it holds nothing for {min(report['missing_keys'])}; fetch it again")
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        inner = Path(unfinished) / "model"
        model.save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        try:
            inner.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster with the same content
                raise
    return target


def weight_map(path: Path) -> dict[str, str]:
    """Which file holds each tensor, as the index of a sharded checkpoint has it."""
    files = read_json(path / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CompressError(f"{path / INDEX} is damaged: expected a weight_map of tensors to files; fetch it again")
    return files
