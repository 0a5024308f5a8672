"""A KV cache that belongs to a loaded checkpoint: its bases are tensors of the model, and plain `generate` uses it.

    model = AutoModelForCausalLM.from_pretrained(OUT)     # a recipe with a kv_cache block
    model.generate(**inputs)                              # quantized keys and values, nothing to pass
    new_cache(model)                                      # the same cache for a forward pass of one's own

config.json holds `quantization_config.kv_cache = {method, options, bases: {keys: [layers], values: [layers], metrics:
[layers]}, heads, head_dim}`; the bases lie in the shards as `compress_kv.keys.<layer>` and so on, fp32 `[heads, head_dim,
head_dim]`. Metrics are those of squat, second moments of queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.cache import KVCache, read_config
from compress.cache.layer import CACHE_ARGUMENT
from compress.errors import CompressError
from compress.layers import keeping_dtype
from compress.model import head_width, kv_heads

CACHE_MODULE = "compress_kv"
SIDES = ("keys", "values", "metrics")


class CacheBases(nn.Module):
    """Bases by side and layer; kept in fp32 in whatever dtype the model runs."""

    def __init__(self, saved: dict[str, Any]) -> None:
        super().__init__()
        self.saved = saved
        shape = (saved["heads"], saved["head_dim"], saved["head_dim"])
        for side in SIDES:
            buffers = nn.Module()
            for layer in _layers_with(saved, side):
                buffers.register_buffer(str(layer), torch.empty(shape, dtype=torch.float32))
            self.add_module(side, buffers)

    def of(self, side: str) -> dict[int, Tensor]:
        """`{layer: basis}`."""
        return {int(name): basis for name, basis in self.get_submodule(side).named_buffers()}

    def _apply(self, fn: Any, recurse: bool = True) -> CacheBases:
        """Follow the model to another device, not to another dtype: a bf16 basis is not orthonormal enough."""
        return super()._apply(keeping_dtype(fn), recurse)


def _layers_with(saved: dict[str, Any], side: str) -> list[int]:
    return saved["bases"].get(side, []) if side == "metrics" else saved["bases"][side]  # metrics came after format 1


def check_saved(saved: Any) -> dict[str, Any]:
    """The `kv_cache` entry of a config.json; CompressError when it is damaged."""
    try:
        read_config(saved["method"], saved["options"])
        sizes_fit = all(type(saved[key]) is int and 0 < saved[key] <= 1 << 16 for key in ("heads", "head_dim"))
        layers_fit = all(type(layer) is int and layer >= 0 for side in SIDES for layer in _layers_with(saved, side))
    except CompressError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CompressError(f"config.json: quantization_config.kv_cache is damaged: {error!r}") from error
    if not sizes_fit or not layers_fit:
        raise CompressError("config.json: quantization_config.kv_cache is damaged: impossible sizes")
    return saved


def expected_tensors(saved: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every basis in the checkpoint."""
    shape = (saved["heads"], saved["head_dim"], saved["head_dim"])
    return {
        f"{CACHE_MODULE}.{side}.{layer}": (shape, torch.float32) for side in SIDES for layer in _layers_with(saved, side)
    }


def new_cache(model: nn.Module, **changes: Any) -> KVCache | None:
    """An empty cache as the checkpoint's recipe has it, or with changed options; None for a model without one."""
    bases = getattr(model, CACHE_MODULE, None)
    if not isinstance(bases, CacheBases):
        return None
    return KVCache(
        model,
        bases.saved["method"],
        **{**bases.saved["options"], **changes},
        key_bases=bases.of("keys") or None,
        value_bases=bases.of("values") or None,
        metrics=bases.of("metrics") or None,
    )


def attach(model: nn.Module, method: str, options: dict[str, Any]) -> None:
    """Give a model without bases a cache of its own, in the place of one it may have; CompressError for wrong options."""
    saved = {
        "method": method,
        "options": read_config(method, options).model_dump(),
        "bases": {side: [] for side in SIDES},
        "heads": kv_heads(model),
        "head_dim": head_width(model),
    }
    KVCache(model.config, method, **saved["options"])  # refuses models that it cannot serve
    model.add_module(CACHE_MODULE, CacheBases(saved))
    model._prepare_cache_for_generation = CachedGeneration(model)


class CachedGeneration:
    """`_prepare_cache_for_generation` of one model: a fresh cache of its own unless the caller says otherwise."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        asked = generation_config.cache_implementation is not None or generation_config.use_cache is False
        if not asked and model_kwargs.get(CACHE_ARGUMENT) is None:
            model_kwargs[CACHE_ARGUMENT] = new_cache(self.model)
        prepare = type(self.model)._prepare_cache_for_generation
        return prepare(self.model, generation_config, model_kwargs, *args, **kwargs)
