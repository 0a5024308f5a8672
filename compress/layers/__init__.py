"""Storage formats. One file per format; the file's name is the format's name in config.json.

A layer is described by a flat, JSON-serialisable `spec`: `{"format": ..., "in_features": ..., "out_features": ...,
"bias": ..., <sizes of the format>}`. The spec alone fixes the shape and dtype of every tensor, so a checkpoint can be
checked, and its size predicted, before anything is allocated. Loading needs no method and no data.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import CompressError

_LARGEST_SIZE = 1 << 22  # no dimension of a layer comes near; above it, lists of groups alone would fill the memory
_EXPECTED = {
    int: f"a whole number from 0 to {_LARGEST_SIZE}", float: "a number", bool: "true or false", str: "a name",
}  # fmt: skip

Spec = dict[str, Any]
TensorSpec = tuple[tuple[int, ...], torch.dtype]


class CompressedLinear(nn.Module, ABC):
    """Stands where an `nn.Linear` stood. Subclasses define `tensors`, `forward` and `dense_weight`.

    Packed floating-point tensors keep the dtype of the spec whatever dtype the model runs in, so that loading, casting
    and saving again give the same bytes.
    """

    format: ClassVar[str]
    sizes: ClassVar[Mapping[str, type]]  # the spec's own keys: int (a size, not negative), float or bool
    options: ClassVar[tuple[str, ...]] = ()  # those that the format's op takes, in its order

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.in_features, self.out_features = spec["in_features"], spec["out_features"]
        self.op_options = tuple(spec[key] for key in self.options)
        for name, (shape, dtype) in self.tensors(spec).items():
            tensor = torch.empty(shape, dtype=dtype)
            if dtype.is_floating_point:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        bias = torch.empty(self.out_features, dtype=getattr(torch, spec["bias"])) if spec["bias"] else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def stored(self, *names: str) -> list[Tensor | None]:
        """Packed tensors by name, None for those that the spec has not: looked up where a module (or its replica, in its
        `__dict__`) keeps them, because the search behind `self.name` takes a decode step as long as small products do."""
        own, integers, floats = self.__dict__, self._buffers, self._parameters
        return [integers[name] if name in integers else floats.get(name, own.get(name)) for name in names]

    def require_width(self, x: Tensor) -> None:
        """Raise ValueError for inputs that this layer does not have: kernels take widths from the weight."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} inputs in the last dimension, got {tuple(x.shape)}")

    @classmethod
    @abstractmethod
    def tensors(cls, spec: Spec) -> dict[str, TensorSpec]:
        """Shape and dtype of every packed tensor, the bias left out; raises ValueError on impossible sizes."""

    @classmethod
    def check(cls, spec: Spec, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError when tensors of the right shape hold something that no kernel may see."""

    @classmethod
    def stands_for(cls, spec: Spec, module: nn.Module) -> bool:
        """Whether a layer of this spec may take the place of a module of the plain model."""
        shape = (spec["in_features"], spec["out_features"])
        return isinstance(module, nn.Linear) and shape == (module.in_features, module.out_features)

    @classmethod
    def rounding(cls, spec: Spec) -> tuple:
        """What decides how inputs are rounded, as a hashable key; empty when they are not."""
        return ()

    @classmethod
    def activation_bits(cls, spec: Spec) -> float:
        """Bits per input value that the arithmetic sees, the scales counted; 16 for formats that leave inputs alone."""
        return 16.0

    @classmethod
    def seen_input(cls, spec: Spec, x: Tensor) -> Tensor:
        """What the layer's arithmetic makes of its inputs: themselves, unless the format rounds them."""
        return x

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The `[out_features, in_features]` fp32 weight that this layer multiplies by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.items() if key != "format")


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `module.to`, `.half` or `.cuda` do to a tensor, without the change of dtype."""

    def kept(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return kept


def names() -> list[str]:
    """The formats in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def layer_class(format: str) -> type[CompressedLinear]:
    """The class of a format; CompressError for one that this version does not have."""
    if format not in names():
        raise CompressError(f"unknown storage format {format!r}; this version reads {', '.join(names())}")
    return importlib.import_module(f"compress.layers.{format}").Layer


def check_spec(spec: Any) -> None:
    """Raise ValueError for what is no spec. JSON and Python tell too little apart: 40.0 and true would pass for sizes."""
    if not isinstance(spec, dict):
        raise ValueError(f"expected a mapping, got {spec!r}")
    kinds = {"format": str, "in_features": int, "out_features": int, **layer_class(spec.get("format")).sizes}
    different = sorted(spec.keys() ^ {*kinds, "bias"})
    if different:
        raise ValueError(f"expected the keys {', '.join([*kinds, 'bias'])}; {', '.join(different)} missing or unknown")
    for key, kind in kinds.items():
        value = spec[key]
        number = type(value) is kind or (kind is float and type(value) is int)
        if not number or (kind is int and not 0 <= value <= _LARGEST_SIZE):
            raise ValueError(f"{key} is {value!r}, expected {_EXPECTED[kind]}")
    dtype = getattr(torch, spec["bias"], None) if isinstance(spec["bias"], str) else None
    if spec["bias"] is not False and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"bias is {spec['bias']!r}, expected false or a floating point dtype")


def all_tensors(spec: Spec) -> dict[str, TensorSpec]:
    """Every tensor of a layer; `spec["bias"]` is false or the dtype of the bias. ValueError for what is no spec."""
    check_spec(spec)
    tensors = dict(layer_class(spec["format"]).tensors(spec))
    if spec["bias"]:
        tensors["bias"] = ((spec["out_features"],), getattr(torch, spec["bias"]))
    return tensors


def packed_bytes(spec: Spec) -> int:
    """Bytes on disk of the tensors that replace the weight (the bias is the same before and after)."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in layer_class(spec["format"]).tensors(spec).values())


def build(spec: Spec) -> CompressedLinear:
    """An empty layer for a spec; allocate under `torch.device("meta")` to get shapes only."""
    return layer_class(spec["format"])(spec)


def dense_bytes(spec: Spec) -> int:
    """Bytes of the same weight in bf16: the denominator of every ratio."""
    return 2 * spec["in_features"] * spec["out_features"]


def compressed_matrices(model: nn.Module) -> dict[str, Spec]:
    """Specs of the compressed linears of a model, by name; the norm that a rotation leaves behind is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    return {name: module.spec for name, module in found.items() if module.format != "rotated_norm"}
