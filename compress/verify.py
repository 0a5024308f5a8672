"""What is checked before a compressed checkpoint may be used: its specs, its tensors against them, its bases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.cache.attached import CACHE_MODULE, CacheBases, check_saved, expected_tensors
from compress.complete import require_exact
from compress.errors import CompressError
from compress.layers import Spec, all_tensors, build, layer_class
from compress.tensorfile import StoredTensor

FORMAT_VERSION = 1


def module_specs(config: Mapping[str, Any]) -> dict[str, Spec]:
    """The specs in a config.json; CompressError when it is not that of a compressed checkpoint of this version."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compress":
        raise CompressError(
            "not a compressed checkpoint: config.json has no quantization_config of quant_method compress; "
            "a dense model is loaded by transformers' AutoModelForCausalLM"
        )
    if quantization.get("version") != FORMAT_VERSION:
        raise CompressError(
            f"checkpoint format {quantization.get('version')!r}, this version reads {FORMAT_VERSION}; update it"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict):
        raise CompressError("config.json: quantization_config.modules is missing")
    return modules


def validate(path: Path, tensors: Mapping[str, StoredTensor], specs: Mapping[str, Spec], cache: Any = None) -> None:
    """Check every tensor's shape and dtype against the specs, and what the tensors hold, before anything is computed.

    Raises:
        CompressError: the first thing that does not fit, with file, tensor, what was expected and what came.
    """
    require_shapes(path, tensors, specs, cache)
    with torch.device("cpu"):  # from_pretrained calls this while it builds on the meta device
        for name, spec in specs.items():
            layer = layer_class(spec["format"])
            integers = {key: dtype for key, (_, dtype) in layer.tensors(spec).items() if not dtype.is_floating_point}
            try:
                layer.check(spec, {key: tensors[f"{name}.{key}"].read() for key in integers})
            except ValueError as error:
                raise CompressError(f"{path} is damaged: {name}: {error}") from error


def require_shapes(path: Path, tensors: Mapping[str, StoredTensor], specs: Mapping[str, Spec], cache: Any = None) -> None:
    """The part of `validate` that reads headers alone."""
    for name, (shape, dtype) in (expected_tensors(check_saved(cache)) if cache else {}).items():
        _require_tensor(path, tensors, name, shape, dtype)
    for name, spec in specs.items():
        try:
            expected = all_tensors(spec)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressError(f"{path / 'config.json'}: the entry of {name} is damaged: {error}") from error
        for key, (shape, dtype) in expected.items():
            _require_tensor(path, tensors, f"{name}.{key}", tuple(shape), dtype)


def _require_tensor(
    path: Path, tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    stored = tensors.get(name)
    if stored is None:
        raise CompressError(f"{path} is damaged: tensor {name} is missing")
    if stored.shape != shape or stored.dtype != dtype:
        raise CompressError(
            f"{stored.path} is damaged: {name} is {stored.dtype} {list(stored.shape)}, "
            f"config.json asks for {dtype} {list(shape)}"
        )


def install(model: nn.Module, specs: Mapping[str, Spec], cache: Any = None) -> None:
    """Put empty compressed layers in the place of a skeleton's linears."""
    for name, spec in specs.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise CompressError(f"config.json names {name}, which this architecture does not have") from error
        if not layer_class(spec["format"]).stands_for(spec, linear):
            raise CompressError(f"config.json: {name} does not fit the model's {linear}")
        with torch.device("meta"):
            model.set_submodule(name, build(spec))
    if cache:
        with torch.device("meta"):
            model.add_module(CACHE_MODULE, CacheBases(check_saved(cache)))


def prepare_skeleton(
    model: nn.Module, path: Path, tensors: Mapping[str, StoredTensor], specs: Mapping[str, Spec], cache: Any = None
) -> None:
    """All checks, and the compressed layers in a skeleton that the tensors then fill without a rest."""
    validate(path, tensors, specs, cache)
    install(model, specs, cache)
    require_exact(model, tensors, path)
