"""Registers the format with transformers, so that `from_pretrained` builds compressed layers.

Importing this module is enough. Only a few hooks of `HfQuantizer` are used, because they move between releases: one to
see the config before weights are looked for, one to replace modules on the meta device, one after loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress import checkpoint
from compress.cache.attached import CACHE_MODULE, CachedGeneration
from compress.layers import CompressedLinear, Spec
from compress.source import read_headers
from compress.verify import FORMAT_VERSION, install, module_specs, prepare_skeleton


class CompressQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: the spec of every compressed module."""

    def __init__(
        self,
        modules: dict[str, Spec] | None = None,
        version: int = FORMAT_VERSION,
        kv_cache: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "compress"
        self.version = version
        self.modules = modules or {}
        if kv_cache:
            self.kv_cache = kv_cache


class CompressHfQuantizer(HfQuantizer):
    """Puts compressed layers in place of linears; the tensor names are the checkpoint's own, so nothing is converted."""

    requires_calibration = True  # a dense model cannot be compressed by from_pretrained: `compress model` does that

    def update_attn_implementation(self, config: Any) -> Any:
        # Called with the config before weight files are resolved: take the guard off (see compress.checkpoint).
        if getattr(config, "transformers_weights", None) == checkpoint.GUARD:
            config.transformers_weights = None
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        specs = module_specs({"quantization_config": self.quantization_config.to_dict()})
        cache = getattr(self.quantization_config, "kv_cache", None)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if files:
            prepare_skeleton(model, files[0].parent, read_headers(files), specs, cache)
        else:  # a state dict in memory
            install(model, specs, cache)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.save_pretrained = _GuardedSave(model)
        if hasattr(model, CACHE_MODULE):
            model._prepare_cache_for_generation = CachedGeneration(model)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model, dtype)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


class _GuardedSave:
    """`save_pretrained` that writes the guard again: transformers drops `transformers_weights` from every saved config."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        file = Path(save_directory) / "config.json"
        if any(isinstance(module, CompressedLinear) for module in self.model.modules()):
            checkpoint.write_json(file, {**json.loads(file.read_text()), "transformers_weights": checkpoint.GUARD})


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace compressed layers by nn.Linear with the multiplied-out weight, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear):
            weight = layer.dense_weight().to(dtype or model.dtype)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, linear)
    return model


def register() -> None:
    """Tell transformers about the format, once per process."""
    if "compress" not in AUTO_QUANTIZER_MAPPING:  # a reloaded module must not register twice
        register_quantization_config("compress")(CompressQuantizationConfig)
        register_quantizer("compress")(CompressHfQuantizer)


register()
