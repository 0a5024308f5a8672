"""A conversation on disk: the packed bytes of every layer in one safetensors file, so that a long prompt is read once.

    tensors    `<layer>.<number>`, the rows in use of each buffer; keys and values of transformers' own layers
    metadata   `compress_kv`: JSON of the cache's options and of what a layer knows beside its tensors

Bases and given metrics belong to the model and are not saved. A file is not the model's: another model of the same shape
would be served wrong states, as with any cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.cache.layer import PackedLayer
from compress.errors import CompressError

_KEY = "compress_kv"
_OWN = ("cumulative_length", "_num_skip_before_crop")  # numbers of transformers' sliding layers


def write_prefix(path: str | Path, layers: list[Any], spec: dict[str, Any]) -> None:
    """Write all layers; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, PackedLayer):
            stored, known = [buffer.rows() for buffer in layer.buffers()], layer.facts()
        else:
            stored = [] if layer.keys is None else [layer.keys, layer.values]
            known = {name: getattr(layer, name) for name in _OWN if hasattr(layer, name)}
        tensors.update({f"{index}.{number}": tensor.contiguous() for number, tensor in enumerate(stored)})
        facts.append(known)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={_KEY: json.dumps({"spec": spec, "layers": facts})})
    partial.replace(path)


@torch.inference_mode(mode=False)
def read_prefix(path: str | Path, layers: list[Any], spec: dict[str, Any], device: torch.device | str) -> None:
    """Fill empty layers with what `write_prefix` wrote."""
    if not Path(path).is_file():
        raise CompressError(f"no saved KV cache at {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            found = json.loads((file.metadata() or {})[_KEY])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise CompressError(f"{path} is not a saved KV cache, or is damaged: {error}") from error
    if found["spec"] != spec:
        differing = [key for key in {**spec, **found["spec"]} if spec.get(key) != found["spec"].get(key)]
        shown = ", ".join(f"{key}={found['spec'].get(key)!r} there, {spec.get(key)!r} here" for key in sorted(differing))
        raise CompressError(f"{path} was saved by a cache with other options: {shown}")
    if len(found["layers"]) != len(layers):
        raise CompressError(f"{path} holds {len(found['layers'])} layers, the model's cache has {len(layers)}")
    for index, (layer, facts) in enumerate(zip(layers, found["layers"], strict=True)):
        tensors = [stored[f"{index}.{number}"] for number in range(sum(name.startswith(f"{index}.") for name in stored))]
        if not tensors:
            continue
        if isinstance(layer, PackedLayer):
            try:
                layer.rebuild(facts, tensors, device)
            except CompressError as error:
                raise CompressError(f"{path}: {error}") from error
        else:
            layer.lazy_initialization(*tensors)
            layer.keys, layer.values = tensors
            for name, value in facts.items():
                setattr(layer, name, value)
