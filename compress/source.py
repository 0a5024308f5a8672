"""A checkpoint on disk: a directory of safetensors with its config, tokenizer and licence.

`open_source` turns whatever the user names (hub id, directory, .gguf file) into a `Source`; tensors are read from it one by
one. Which files hold the weights is decided as transformers decides it, so that what is checked is what will be loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.fetch import INDEX, TEMPLATES, WEIGHTS, fetch, weight_map
from compress.jsonfile import read_json
from compress.tensorfile import StoredTensor, read_header

_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py"}
# what a compressed checkpoint says of itself, beside its weights and config
REPORT, RECIPE, ALLOCATION = "report.json", "recipe.yaml", "allocation.json"
RECORDS = (REPORT, RECIPE, ALLOCATION)
_NOT_COPIED = {*RECORDS, "config.json", "README.md", "adapter_config.json"}
_FINGERPRINT_BYTES = 4096


@dataclass
class Source:
    """A checkpoint on disk: its directory, config and where each tensor lies."""

    path: Path
    config: dict
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """One tensor as stored; CompressError when it holds NaN or infinite values."""
        tensor = self.tensors[name].read()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CompressError(f"weights of {name} hold NaN or infinite values; the model is damaged")
        return tensor

    def changed(self) -> list[str]:
        """Names of the tensors that `read` gives other numbers for than are stored."""
        return []

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint on disk."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """Hash of the config, every tensor's name, shape and dtype, and its first 4 KB: which model this is, cheaply."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.code} {tensor.shape}".encode())
            with open(tensor.path, "rb") as file:
                file.seek(tensor.offset)
                digest.update(file.read(min(tensor.num_bytes, _FINGERPRINT_BYTES)))
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, licence and the like: what is copied to the result unchanged."""

        def copied(path: Path) -> bool:
            named = path.suffix in _COPIED_SUFFIXES or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
            return path.is_file() and named and path.name not in _NOT_COPIED and not path.name.endswith(".index.json")

        return [path for path in (*sorted(self.path.iterdir()), *sorted(self.path.glob(TEMPLATES))) if copied(path)]

    def copy_side_files(self, output: Path) -> None:
        """Copy them into a directory that is there."""
        for path in self.side_files():
            copy = output / path.relative_to(self.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def open_source(model: str | Path) -> Source:
    """Resolve a hub id, a local directory or a .gguf file to a readable checkpoint.

    Raises:
        CompressError: nothing there, not a causal language model, no safetensors, or already compressed or quantized.
    """
    path = fetch(str(model))
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CompressError(f"{path} holds no config.json; expected a Hugging Face model directory")
    return Source(path, read_json(config_file), read_tensor_index(path))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory that transformers would load: the single file before shards with an index."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        pickled = sorted(path.glob("*.bin"))
        hint = f"; {pickled[0].name} is pickled and never opened: convert it to safetensors first" if pickled else ""
        raise CompressError(f"{path} holds no {WEIGHTS}{hint}")
    files = sorted(set(weight_map(path).values()))
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise CompressError(f"{path} lacks the shard {file} that its index names; fetch it again")
    return [path / file for file in files]


def read_tensor_index(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors directory lies, one file or shards; refuses pickled weights."""
    files = weight_files(path)
    tensors = read_headers(files)
    if files != [path / WEIGHTS]:
        missing = sorted(set(weight_map(path)) - set(tensors))
        if missing:
            raise CompressError(f"{path}: no shard holds {missing[0]}, which the index names; fetch it again")
    return tensors


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files; a name that two of them hold is the later one's, as in transformers."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors
