"""Everything we know about Hugging Face models: where MODEL lies, what its blocks are, which linears can be compressed.

A model is opened as a directory of safetensors (`Source`) and a skeleton on the meta device; block by block, tensors are
read into the skeleton, used and dropped. A GGUF file is first rewritten as such a directory, in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.tensorfile import StoredTensor, read_header

_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py"}
_FINGERPRINT_BYTES = 4096


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/subspace-compress`, as the desktop convention has it; made when missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-compress"
    path.mkdir(parents=True, exist_ok=True)
    return path


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
        """Tokenizer, generation config and the like: what is copied to the result unchanged."""
        skipped = {"config.json", INDEX, "README.md", "report.json", "recipe.yaml"}
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file() and path.suffix in _COPIED_SUFFIXES and path.name not in skipped
        ]


def open_source(model: str | Path) -> Source:
    """Resolve a hub id, a local directory or a .gguf file to a readable checkpoint.

    Raises:
        CompressError: nothing there, not a causal language model, no safetensors, or already compressed or quantized.
    """
    path = _resolve(str(model))
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CompressError(f"{path} holds no config.json; expected a Hugging Face model directory")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{config_file} is not valid JSON") from error
    return Source(path, config, read_tensor_index(path))


def read_tensor_index(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors directory lies, one file or shards; refuses pickled weights."""
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressError(f"{path / INDEX} is damaged; fetch it again") from error
    elif (path / _WEIGHTS).is_file():
        weight_map, files = None, [_WEIGHTS]
    else:
        pickled = sorted(path.glob("*.bin"))
        hint = f"; {pickled[0].name} is pickled and never opened: convert it to safetensors first" if pickled else ""
        raise CompressError(f"{path} holds no {_WEIGHTS}{hint}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise CompressError(f"{path} lacks the shard {file} that its index names; fetch it again")
        tensors.update(read_header(path / file))
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise CompressError(f"{path}: no shard holds {missing[0]}, which the index names; fetch it again")
    return tensors


def require_compressible(source: Source) -> None:
    """Refuse what is not a plain causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    quantization = source.config.get("quantization_config")
    if quantization:
        if quantization.get("quant_method") == "compress":
            raise CompressError(f"{source.path} is already compressed; start from the original model")
        raise CompressError(
            f"{source.path} is already quantized ({quantization.get('quant_method')}); start from the original model"
        )
    try:
        config = AutoConfig.from_pretrained(source.path)
    except (ValueError, KeyError, OSError) as error:
        raise CompressError(f"{source.path}: {' '.join(str(error).split())[:300]}") from error
    architectures = source.config.get("architectures") or []
    causal = {cls.__name__ for cls in MODEL_FOR_CAUSAL_LM_MAPPING.values() if isinstance(cls, type)}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (architectures and not causal & set(architectures)):
        raise CompressError(
            f"{source.path} is not a causal language model ({', '.join(architectures) or config.model_type})"
        )


def build_skeleton(path: Path) -> nn.Module:
    """The model with its parameters on the meta device and its (rotary) buffers real, in eval mode."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    return model.eval()


def load_for_evaluation(model: str | Path, device: str = "auto") -> tuple[nn.Module, Any]:
    """A model, compressed or not, with its tokenizer, in fp32 on a CPU and as stored on a GPU.

    fp32 on a CPU for both sides of a comparison: bf16 arithmetic there depends on the machine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = open_source(model).path
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        dtype = torch.float32 if device == "cpu" else "auto"
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), tokenizer
    except CompressError:
        raise
    except (ValueError, KeyError, OSError) as error:
        raise CompressError(f"{path}: {' '.join(str(error).split())[:300]}") from error


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks, e.g. `model.layers`.

    Raises:
        CompressError: no list of modules has the length that the config states.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 3:
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
    """Width of one attention head."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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

    part = {name: source.read(name) for name in source.tensors if name.startswith(prefix)}
    config = LoadStateDictConfig(dtype=dtype, dtype_plan={}, weight_mapping=get_model_conversion_mapping(model))
    convert_and_load_state_dict_in_model(model, part, config)


def _resolve(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return _rewrite_gguf(path)
        raise CompressError(f"{model} is a file; expected a model directory, a hub id or a .gguf file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise CompressError(f"{model} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CompressError(f"{model} is neither a local path nor a model on the Hugging Face hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CompressError(
            f"{model} is not a local path, and the Hugging Face hub cannot be reached; give a directory or a .gguf file"
        ) from error


def _rewrite_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a bf16 safetensors directory in the cache, once per file content."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    target = cache_dir() / "gguf" / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    target.parent.mkdir(exist_ok=True)
    folder, name = path.parent, path.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, OSError) as error:
        raise CompressError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    # The loaded model carries a gguf quantization_config that forbids saving: rebuild it from a clean config.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    clean = type(loaded.config).from_dict(config)
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        inner = Path(unfinished) / "model"
        model.save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        shutil.move(inner, target)
    return target
