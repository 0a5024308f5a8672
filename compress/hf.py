"""Registers the format with transformers, so that `from_pretrained` builds compressed layers.

Importing this module is enough. Only a few hooks of `HfQuantizer` are used, because they move between releases: one to
see the config before weights are looked for, one to replace modules on the meta device, one after loading.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress import checkpoint
from compress.cache.attached import CACHE_MODULE, CachedGeneration
from compress.jsonfile import read_json, write_json
from compress.layers import CompressedLinear, Spec
from compress.model import decoder_blocks
from compress.source import RECORDS, REPORT, read_headers, read_tensor_index
from compress.tensorfile import write_whole
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

    def update_device_map(self, device_map: Any) -> Any:
        # A map by hand names the architecture's own modules; the bases of a KV cache are ours, and follow their layers.
        if isinstance(device_map, dict) and device_map and "" not in device_map:
            device_map.setdefault(CACHE_MODULE, next(iter(device_map.values())))
        return device_map

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        specs = module_specs({"quantization_config": self.quantization_config.to_dict()})
        cache = getattr(self.quantization_config, "kv_cache", None)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        self.origin = files[0].parent if files else None
        if self.origin:
            prepare_skeleton(model, self.origin, read_headers(files), specs, cache)
        else:  # a state dict in memory
            install(model, specs, cache)
        for part in _pretrained(model):
            part._init_weights = _Initialise(part)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for part in _pretrained(model):
            del part._init_weights  # the class's own shows again
        for layer in model.modules():
            if isinstance(layer, CompressedLinear):  # transformers has made parameters of them that are trained
                layer.requires_grad_(False)
        model.save_pretrained = _Save(model, self.origin)
        if hasattr(model, CACHE_MODULE):
            model._prepare_cache_for_generation = CachedGeneration(model)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model, dtype)

    @property
    def is_trainable(self) -> bool:
        return True  # what lies around packed layers: gradients pass through them

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _pretrained(model: nn.Module) -> list[PreTrainedModel]:
    """The models inside a model, itself among them, which transformers initialises one by one."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


class _Initialise:
    """`_init_weights` of one model while it is loaded. A few (Mamba 2, RecurrentGemma) set `child.weight` of linears, which
    packed ones do not have; nothing is missing from a checkpoint that was checked, so such a module may be passed over."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.own = model._init_weights

    def __call__(self, module: nn.Module) -> None:
        try:
            self.own(module)
        except AttributeError as error:
            if not isinstance(error.obj, CompressedLinear):
                raise


class _Save:
    """`save_pretrained` of one model that completes what transformers writes, before it is uploaded anywhere.

    transformers drops `transformers_weights`, our guard, from every config that it saves, and knows nothing of the report
    and the recipe that lay where the model was loaded from.
    """

    def __init__(self, model: nn.Module, origin: Path | None) -> None:
        self.model = model
        files = [origin / name for name in RECORDS] if origin else []
        self.carried = {file.name: file.read_bytes() for file in files if file.is_file()}  # `origin` may not last

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        model, folder = self.model, Path(save_directory)
        upload = model._upload_modified_files

        def upload_completed(*inner: Any, **options: Any) -> Any:
            self._complete(folder)
            return upload(*inner, **options)

        model._upload_modified_files = upload_completed
        try:
            type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
        finally:
            del model._upload_modified_files
        if is_main_process:
            self._complete(folder)

    def _complete(self, folder: Path) -> None:
        if any(isinstance(module, CompressedLinear) for module in self.model.modules()):
            config = read_json(folder / "config.json")
            write_json(folder / "config.json", {**config, "transformers_weights": checkpoint.GUARD})
            for name, content in self.carried.items():
                write_whole(folder / name, [content])
            if REPORT in self.carried:  # another dtype has other bytes
                stored = sum(tensor.num_bytes for tensor in read_tensor_index(folder).values())
                write_json(folder / REPORT, {**read_json(folder / REPORT), "checkpoint_bytes": stored})


def dequantize(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Replace compressed layers by nn.Linear with the multiplied-out weight, in place; generation gets a plain cache."""
    if isinstance(dtype, str):  # what save_pretrained leaves in a config, and transformers hands on
        dtype = getattr(torch, dtype.removeprefix("torch."))
    dtype = dtype or model.dtype
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, CompressedLinear):
            continue
        if layer.format == "rotated_norm":
            _untie(model, name, layer, dtype)
        else:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            model.set_submodule(name, _linear(layer.dense_weight().to(dtype), bias))
    if hasattr(model, CACHE_MODULE):
        delattr(model, CACHE_MODULE)
        del model._prepare_cache_for_generation
    return model


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _untie(model: nn.Module, name: str, layer: CompressedLinear, dtype: torch.dtype) -> None:
    """A plain norm has no place for a matrix: it goes into an output projection of its own, as in `compress.export`."""
    norm = copy.deepcopy(decoder_blocks(model)[1][0].input_layernorm)  # of a rotated model, so its gains are in the linears
    norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    model.set_submodule(name, norm)
    embedding = model.get_input_embeddings().weight
    model.set_output_embeddings(_linear((embedding.float() @ layer.dense_weight()).to(dtype)))
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def register() -> None:
    """Tell transformers about the format, once per process."""
    if "compress" not in AUTO_QUANTIZER_MAPPING:  # a reloaded module must not register twice
        register_quantization_config("compress")(CompressQuantizationConfig)
        register_quantizer("compress")(CompressHfQuantizer)


register()
