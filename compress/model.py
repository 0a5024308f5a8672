"""Everything we know about Hugging Face models: what their blocks are, which linears can be compressed.

A model is a `Source` of tensors and a skeleton on the meta device; block by block, tensors are read into the skeleton, used
and dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.complete import require_blocks
from compress.errors import CompressError, readable_errors
from compress.source import Source, open_source

# tables of learned positions, as models call them
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed")


def require_compressible(source: Source) -> None:
    """Refuse what is not a plain causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    quantization = source.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        done = "compressed" if method == "compress" else f"quantized ({method})"
        raise CompressError(f"{source.path} is already {done}; start from the original model")
    config = read_config(source)
    architectures = source.config.get("architectures") or []
    causal = {cls.__name__ for cls in MODEL_FOR_CAUSAL_LM_MAPPING.values() if isinstance(cls, type)}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (architectures and not causal & set(architectures)):
        raise CompressError(
            f"{source.path} is not a causal language model ({', '.join(architectures) or config.model_type})"
        )


def read_config(source: Source) -> Any:
    """The model's config as transformers has it; CompressError when it cannot be used with these tensors."""
    from transformers import AutoConfig

    require_blocks(source.config, source.tensors, source.path)
    with readable_errors(source.path):
        return AutoConfig.from_pretrained(source.path)


def build_skeleton(path: Path) -> nn.Module:
    """The model with its parameters on the meta device and its (rotary) buffers real, in eval mode."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable_errors(path), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()


def load_for_evaluation(model: str | Path, device: str = "auto") -> tuple[nn.Module, Any]:
    """A model, compressed or not, with its tokenizer, in fp32 on a CPU and as stored on a GPU.

    fp32 on a CPU for both sides of a comparison: bf16 arithmetic there depends on the machine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = open_source(model).path
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with readable_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        dtype = torch.float32 if device == "cpu" else "auto"
        loaded, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise CompressError(f"{path} is incomplete: {min(report['missing_keys'])} is missing; fetch it again")
        return loaded.to(device).eval(), tokenizer


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks, e.g. `model.layers`.

    Raises:
        CompressError: no list of modules has the length that the config states.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = set(model.get_decoder().modules())  # a vision tower may have as many blocks
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 3 and module in decoder:
            return name, module
    raise CompressError(f"{type(model).__name__}: found no list of {count} decoder blocks")


def inputs_of(model: nn.Module, name: str, module: nn.Linear) -> tuple[str, int]:
    """What a linear layer reads, as `compress.methods.Site` names it, and the number of heads side by side in it."""
    leaf = name.rpartition(".")[2]
    if leaf in {"q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"}:
        return "stream", 0
    if leaf == "o_proj":
        head_dim = head_width(model)
        return ("heads", module.in_features // head_dim) if module.in_features % head_dim == 0 else ("other", 0)
    return ("hidden", 0) if leaf == "down_proj" else ("other", 0)


def head_width(model: nn.Module) -> int:
    """Width of one attention head; of the whole stream where there are none (Mamba)."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)


def kv_heads(model: nn.Module) -> int:
    """Key and value heads of a layer; a config without the word has one for every query head."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def require_fits(model: nn.Module, ids: Tensor, lower: str) -> None:
    """Refuse token ids `[sequences, length]` that the model's tables do not have; `lower` says what to lower.

    Raises:
        CompressError: a length beyond learned positions, or a token beyond the embedding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            places = module.num_embeddings - getattr(module, "offset", 0)
            if ids.shape[1] > places:
                raise CompressError(f"{type(model).__name__} has {places} positions, {ids.shape[1]} are asked for; {lower}")
    known = len(model.get_input_embeddings().weight)
    if ids.numel() and int(ids.max()) >= known:
        raise CompressError(
            f"the tokenizer gives token {int(ids.max())}, {type(model).__name__} knows {known}: it is another model's"
        )


def output_head(model: nn.Module) -> str | None:
    """Module name of the output projection, if it is an nn.Linear."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear)), None)


def is_tied(model: nn.Module) -> bool:
    """Whether the output projection shares its weight with the embedding."""
    return bool(model.config.get_text_config(decoder=True).tie_word_embeddings)


def materialise(model: nn.Module, source: Source, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
    """Read the parameters under a module-name prefix into the skeleton, floating point ones as `dtype`.

    Where a checkpoint stores them in another form (the experts of a mixture, one by one), transformers' own conversion
    builds them.
    """
    missing = []
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(prefix) or not parameter.is_meta:
            continue
        if name in source.tensors:
            stored = source.tensors[name]
            if stored.shape != tuple(parameter.shape):
                raise CompressError(f"{name} has shape {list(stored.shape)}, config.json asks for {list(parameter.shape)}")
            _set_parameter(model, name, source.read(name).to(device, dtype))
        else:
            missing.append(name)
    if missing:
        _convert(model, source, prefix, dtype)
        for name in missing:
            parameter = model.get_parameter(name)
            if parameter.is_meta:
                raise CompressError(
                    f"{source.path} holds no tensor for {name}; its names are not those of this architecture"
                )
            _set_parameter(model, name, parameter.data.to(device, dtype))


def materialise_head(model: nn.Module, source: Source, blocks_name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Read what lies behind the blocks, the final norm and the output projection, into the skeleton."""
    head, tied = output_head(model), is_tied(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not name.startswith(f"{blocks_name}.") and not (tied and name == f"{head}.weight"):
            materialise(model, source, name, dtype, device)
    if tied and head:
        model.get_submodule(head).weight = model.get_input_embeddings().weight


def release(model: nn.Module, prefix: str) -> None:
    """Drop the parameters under a prefix back to the meta device."""
    for name, parameter in list(model.named_parameters()):
        if name.startswith(prefix) and not parameter.is_meta:
            _set_parameter(model, name, torch.empty_like(parameter, device="meta"))


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _convert(model: nn.Module, source: Source, prefix: str, dtype: torch.dtype) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    names = [name for name in source.tensors if name.startswith(prefix)]
    if not names:  # a head that files hold under another name (GPT-NeoX): it is among what lies outside the blocks
        blocks_name, _ = decoder_blocks(model)
        names = [name for name in source.tensors if not name.startswith(f"{blocks_name}.")]
    part = {name: source.read(name) for name in names}
    config = LoadStateDictConfig(dtype=dtype, dtype_plan={}, weight_mapping=get_model_conversion_mapping(model))
    convert_and_load_state_dict_in_model(model, part, config)
