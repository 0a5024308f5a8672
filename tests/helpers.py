"""Tiny random models of several families, their tokenizer, and where the public evaluation data lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DATA = ROOT.parent / "shared" / "data"  # an optional local copy of the public data sets; the hub is used without it

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 32},  # o_proj is 128 x 64, not square
    "qwen2": {},  # biases on q, k, v
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},  # fused qkv_proj and gate_up_proj
}
FAMILIES["gemma3_text"]["num_hidden_layers"] = 4


def tiny_model(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random fp32 model. Norms and biases are random too, so that forgetting one shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: any text, no download."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!", eos_token='"')


def save_tiny(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model with its tokenizer as a Hugging Face directory."""
    tiny_model(family, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_recipe(**weights: Any) -> dict[str, Any]:
    """A recipe that finishes in a second."""
    learned = {"method": "cospadi", "dictionary": "learned", "ratio": 0.2, "iterations": 3, "refits": 4}
    if weights.get("method", "cospadi") != "cospadi":
        learned = {"ratio": 0.2}
    return {
        "calibration": {"dataset": "python-docs", "samples": 8, "length": 64},
        "weights": {**learned, **weights},
    }


def task_files(path: Path) -> Path:
    """Three documents of PIQA and of GSM8K in the hub's schema, as `--data` takes them."""
    documents = {
        "piqa/validation": {"goal": "To open a jar", "sol1": "turn the lid", "sol2": "eat the jar", "label": 0},
        "gsm8k/test": {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    }
    for name, row in documents.items():
        file = path / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        first = next(iter(row))
        file.write_text("\n".join(json.dumps({**row, first: f"{number}. {row[first]}"}) for number in range(3)))
    return path
