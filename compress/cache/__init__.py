"""Packed, quantized KV caches for any transformers model with ordinary attention, in one argument of `generate`.

    from compress.cache import KVCache
    model.generate(**inputs, cache=KVCache(model, bits=4, high_channels=8))  # past_key_values= before transformers 5.24

The methods are `METHODS`; `compress/cache/<method>.py` holds

    class Config(CacheConfig)                                       its options, each documented
    class Layer(PackedLayer)                                        Layer(config, key_basis, value_basis)

Full-attention layers become packed layers; sliding-window and chunked layers keep transformers' own, which hold no more
than their window, and layers that reuse another's cache hold nothing. Layers with another kind of state (linear
attention, convolutions, latent attention as in DeepSeek, encoder-decoders) are refused: what they store is not keys and
values. A cache is one conversation: `generate` fills it and goes on from it, `reset` empties it, `deepcopy` forks it.

Bases belong to the model, not to a conversation, so `nbytes` does not count them. They must be kept in fp32: the columns
of a bf16 basis are orthonormal to 2^-8 only, and the keys would come back with that error.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from compress.cache.layer import CACHE_ARGUMENT, CacheConfig, PackedLayer
from compress.cache.prefix import read_prefix, write_prefix
from compress.cache.queries import show_queries
from compress.cache.wave import waves_of
from compress.errors import CompressError
from compress.model import head_width
from compress.suggest import unknown

METHODS = ("fp8", "kivi", "per_token", "squat")
_OWN_LAYER = ("sliding_attention", "chunked_attention", "dummy")

Bases = Mapping[int, Tensor] | Sequence[Tensor | None]


class KVCache(Cache):
    """A transformers cache whose full-attention layers are packed.

    Args:
        model_or_config: the model, or its config.
        method: one of `METHODS`.
        bits: 2 to 8 bits per code; None: 4 for per_token, 2 for kivi and squat, 8 for fp8. 16 (not fp8) keeps the
            states as they came.
        key_bases, value_bases: orthonormal bases by layer index, `[head_dim, head_dim]` or
            `[kv_heads, head_dim, head_dim]`; those of layers that are not packed are not read.
        metrics: for squat, second moments of the queries by layer index, `[kv_heads, head_dim, head_dim]`; without them
            the prompt's own queries decide.
        offloading: keep layers on the CPU and fetch each one ahead of its turn, as `DynamicCache` does; needs a GPU.
        options: what the method's `Config` knows, for per_token: key_bits, value_bits, high_bits, high_channels,
            sink_tokens, exact_prefill, capacity.

    Raises:
        CompressError: unknown method or option, a value out of range, or a model whose cache is not keys and values.
    """

    def __init__(
        self,
        model_or_config: nn.Module | PreTrainedConfig,
        method: str = "per_token",
        bits: int | None = None,
        *,
        key_bases: Bases | None = None,
        value_bases: Bases | None = None,
        metrics: Bases | None = None,
        offloading: bool = False,
        **options: Any,
    ) -> None:
        self.method = method
        self.options = read_config(method, options if bits is None else {"bits": bits, **options})
        layer_types, layer_kwargs = _layers_of(getattr(model_or_config, "config", model_or_config))
        keys, values = (
            _by_layer(name, bases, len(layer_types))
            for name, bases in (("key_bases", key_bases), ("value_bases", value_bases))
        )
        given = _by_layer("metrics", metrics, len(layer_types))
        packed = load(method).Layer
        if given and not packed.takes_metric:
            raise CompressError(f"KV cache method {method} takes no metrics; squat does")
        layers = [
            packed(
                self.options,
                keys.get(index),
                values.get(index),
                **({"metric": given.get(index)} if packed.takes_metric else {}),
            )
            if layer_type == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)
            for index, (layer_type, kwargs) in enumerate(zip(layer_types, layer_kwargs, strict=True))
        ]
        super().__init__(layers=layers, offloading=offloading)
        self._device = getattr(model_or_config, "device", None)
        for index, layer in enumerate(self.layers):
            layer.index, layer.stays = index, not offloading
        if not packed.reads_in_one_pass and isinstance(model_or_config, nn.Module):
            watched = show_queries(model_or_config)
            waves = waves_of(model_or_config, head_width(model_or_config))
            for index, layer in enumerate(self.layers):
                if isinstance(layer, PackedLayer):
                    layer.watched, layer.wave = watched, waves.get(index)

    @property
    def spec(self) -> dict[str, Any]:
        """Plain data; `KVCache(model, **spec, key_bases=..., value_bases=...)` makes the same cache, empty."""
        return {"method": self.method, **self.options.model_dump()}

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers that are not transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def reads_in_one_pass(self) -> bool:
        """Whether one forward pass over a text sees the keys and values that decoding it token by token would see."""
        return all(layer.reads_in_one_pass for layer in self.packed)

    def alike(self) -> int:
        """How many tokens may come in one call so that each is answered as if they came one by one."""
        return min(layer.alike() for layer in self.packed)

    def save(self, path: str | Path) -> None:
        """Write the conversation so far to a safetensors file, as packed as it is; see `load`."""
        write_prefix(path, self.layers, self.spec)

    def load(self, path: str | Path, device: torch.device | str | None = None) -> None:
        """Go on from a saved conversation, in the place of what is held, on the model's device unless another is named.

        Raises:
            CompressError: no such file, not a saved cache, damaged, or of a cache with other options or layers.
        """
        self.reset()
        read_prefix(path, self.layers, self.spec, device or self._device or "cpu")

    @property
    def nbytes(self) -> int:
        """Bytes in use in all layers, those of transformers included."""
        return bytes_in_use(self)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes that packed layers allocated for tokens to come."""
        return sum(layer.reserved_nbytes for layer in self.packed)

    @property
    def packed_bits_per_element(self) -> float:
        """Bits of a key or value that is packed, its share of scales and minima counted; 0 when none is."""
        counts = [layer.packed_size() for layer in self.packed]
        elements = sum(count for _, count in counts)
        return 8 * sum(size for size, _ in counts) / elements if elements else 0.0

    @property
    def bits_per_element(self) -> float:
        """Measured bits per stored key or value element, over all layers; 0 when empty."""
        elements = sum(_layer_bytes(layer)[1] for layer in self.layers)
        return 8 * self.nbytes / elements if elements else 0.0


@torch.no_grad()
def query_moments(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """`metrics` for `KVCache(model, "squat", metrics=...)` from a text of one's own, token ids `[batch, tokens]`.

    Raises:
        CompressError: an attention function that does not show its queries.
    """
    cache = KVCache(model, "squat", window=ids.shape[1], block=1)  # nothing is packed, so everything is collected
    if not all(layer.watched for layer in cache.packed):
        raise CompressError(
            f"{type(model).__name__} shows no queries: its attention is not sdpa or eager of transformers' interface"
        )
    model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return {index: layer.moment() for index, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)}


def load(method: str) -> ModuleType:
    """Import one method; an unknown name is answered with the nearest one."""
    if method not in METHODS:
        raise CompressError(unknown("KV cache method", method, METHODS))
    return importlib.import_module(f"compress.cache.{method}")


def read_config(method: str, options: Mapping[str, Any]) -> CacheConfig:
    """Check a method's options; CompressError names the first wrong one."""
    cls = load(method).Config
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise CompressError(unknown(f"option of KV cache method {method}", key, cls.model_fields)) from error
        message = first["msg"].removeprefix("Value error, ")
        if not key:  # of several options together
            raise CompressError(f"KV cache: {message}") from error
        raise CompressError(f"KV cache: {key}: {message}, got {first['input']!r}") from error


def _layers_of(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of every decoder layer and what transformers' own cache layer needs; refuses what cannot be packed."""
    text = config.get_text_config(decoder=True)
    name = f"KV cache: {text.model_type}"
    if config.is_encoder_decoder:
        raise CompressError(f"{name} is an encoder-decoder; only decoder-only models have a packed cache")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise CompressError(f"{name} caches latents of multi-head latent attention (MLA), not keys and values")
    layer_types, layer_kwargs = get_layer_types_and_kwargs(text)
    strange = sorted(set(layer_types) - {"full_attention", *_OWN_LAYER})
    if strange:
        raise CompressError(f"{name} has layers of type {', '.join(strange)}, whose state is not keys and values per token")
    if "full_attention" not in layer_types:
        raise CompressError(f"{name} has sliding-window layers only; their cache is as small as the window already")
    return layer_types, layer_kwargs


def packed_layers(config: PreTrainedConfig) -> list[int]:
    """The layers of a text model whose keys and values a cache packs."""
    return [index for index, kind in enumerate(get_layer_types_and_kwargs(config)[0]) if kind == "full_attention"]


def _by_layer(name: str, bases: Bases | None, layers: int) -> dict[int, Tensor | None]:
    """Bases as a dictionary by layer index."""
    if bases is None:
        return {}
    if isinstance(bases, Mapping):
        if wrong := [key for key in bases if key not in range(layers)]:
            raise CompressError(f"{name}: expected layer indices 0 to {layers - 1}, got {wrong[0]!r}")
        return dict(bases)
    if len(bases) != layers:
        raise CompressError(f"{name}: expected one per layer, {layers}, got {len(bases)}")
    return dict(enumerate(bases))


def bytes_in_use(cache: Cache) -> int:
    """Bytes of the keys and values of any cache, as they are stored."""
    return sum(_layer_bytes(layer)[0] for layer in cache.layers)


def _layer_bytes(layer: Any) -> tuple[int, int]:
    """Bytes and elements in use in one layer, packed or transformers' own."""
    if isinstance(layer, PackedLayer):
        return layer.nbytes, layer.numel()
    tensors = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors), sum(tensor.numel() for tensor in tensors)
