"""A dense copy: the compressed model as an ordinary bf16 checkpoint for any engine, one matrix in memory at a time."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.cache.attached import CACHE_MODULE
from compress.checkpoint import write_shards
from compress.errors import CompressError
from compress.jsonfile import write_json
from compress.layers import Spec, build, dense_bytes
from compress.model import build_skeleton, read_config
from compress.source import Source, open_source
from compress.staging import clear, is_vacant, locked, publish
from compress.tensorfile import CastTensor, StoredTensor, read_header, write_file
from compress.verify import module_specs, prepare_skeleton

_DROPPED = {"quantization_config", "transformers_weights", "torch_dtype"}
_CHUNK_ROWS = 8192  # rows of the embedding multiplied at once


def export_dense(path: str | Path, output: str | Path, max_shard_bytes: int = 4 << 30) -> int:
    """Write an ordinary bf16 checkpoint with every compressed matrix multiplied out; returns its bytes.

    Raises:
        CompressError: not a compressed checkpoint, incomplete or damaged, or no place for the output.
    """
    source, output = open_source(path), Path(output).absolute()
    _require_vacant(output)
    if not output.parent.is_dir():
        raise CompressError(f"{output.parent} does not exist; make it first")
    specs, tensors = module_specs(source.config), dict(source.tensors)
    read_config(source)
    skeleton = build_skeleton(source.path)
    prepare_skeleton(skeleton, source.path, tensors, specs, source.config["quantization_config"].get("kv_cache"))
    for name in [name for name in tensors if name.startswith(f"{CACHE_MODULE}.")]:
        del tensors[name]  # a way to keep keys and values, not a part of the function
    _require_space(tensors, specs, output.parent)
    staging = output.with_name(f".{output.name}.export")  # `compress model -o` keeps its unfinished runs in .NAME.partial
    with locked(staging):  # of which nothing stays, whatever happens
        clear(staging)  # of an export that was killed
        _require_vacant(output)  # another process may have finished it since
        (staging / "matrices").mkdir(parents=True)
        (staging / "whole").mkdir()
        untied = _multiply_out(specs, tensors, staging / "matrices")
        tensors = {name: tensor if _kept(skeleton, name) else _in_bf16(tensor) for name, tensor in tensors.items()}
        total = write_shards(staging / "whole", tensors, max_shard_bytes)
        write_json(staging / "whole" / "config.json", _dense_config(source, untied))
        source.copy_side_files(staging / "whole")
        publish(staging / "whole", output)
        return total


def _require_vacant(output: Path) -> None:
    if not is_vacant(output):
        raise CompressError(f"{output} already exists; choose another -o or remove it")


def _require_space(tensors: dict[str, StoredTensor], specs: dict[str, Spec], folder: Path) -> None:
    """The matrices, and the shards that they are copied into; a rotated norm becomes a second embedding at most."""
    copied = sum(tensor.num_bytes for tensor in tensors.values())
    needed = 2 * copied + 2 * sum(map(dense_bytes, specs.values())) + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CompressError(f"no space left: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")


def _multiply_out(specs: dict[str, Spec], tensors: dict[str, StoredTensor], folder: Path) -> bool:
    """Put dense matrices, in files of their own, in the place of packed tensors; says whether the head had to be untied."""
    untied = False
    for number, (name, spec) in enumerate(specs.items()):
        layer = build({**spec, "bias": False})
        layer.load_state_dict({key: tensors.pop(f"{name}.{key}").read() for key in layer.state_dict()})
        dense = {f"{name}.weight": layer.dense_weight().to(torch.bfloat16)}
        if spec["format"] == "rotated_norm":
            dense, untied = _untied_head(name, layer.dense_weight(), tensors), True
        file = folder / f"{number}.safetensors"
        write_file(file, dense)
        tensors.update(read_header(file))
    return untied


def _untied_head(norm: str, gain_II: Tensor, tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """A plain model has no place for a matrix behind its final norm: it goes into an output projection of its own."""
    embedding = tensors[f"{norm.rpartition('.')[0]}.embed_tokens.weight"].read()
    head = torch.cat([(rows.float() @ gain_II).to(torch.bfloat16) for rows in embedding.split(_CHUNK_ROWS)])
    return {f"{norm}.weight": torch.ones(len(gain_II), dtype=torch.bfloat16), "lm_head.weight": head}


def _kept(skeleton: nn.Module, name: str) -> bool:
    """What transformers keeps in fp32 whatever the model's dtype, such as the bias that chooses experts."""
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in skeleton._keep_in_fp32_modules_strict or ())


def _in_bf16(tensor: StoredTensor) -> StoredTensor:
    cast = tensor.dtype.is_floating_point and tensor.dtype != torch.bfloat16
    return CastTensor.of(tensor, torch.bfloat16) if cast else tensor


def _dense_config(source: Source, untied: bool) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key not in _DROPPED} | {"dtype": "bfloat16"}
    return config | {"tie_word_embeddings": False} if untied else config
