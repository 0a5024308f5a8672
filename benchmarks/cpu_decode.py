"""Decoding on a CPU: tokens per second of compressed models against the dense one, in one process.

    python -P benchmarks/cpu_decode.py                          # SmolLM2-135M's shape and one of 1B
    python -P benchmarks/cpu_decode.py --shapes 1b --threads 2 --recipes gptq-w4 cospadi-40

The models hold random numbers: speed does not depend on them, and nothing has to be fetched or compressed. Every layer has
the format that its recipe plans; embedding, norms and head are the dense model's. The dense model runs in fp32 and in bf16,
and the faster one is what ratios refer to. One JSON line per model: tokens per second of decoding after a prompt, medians
over rounds that are interleaved between the models, and the time of a prompt of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from compress.kernels.sparse_dictionary import pack_mask
from compress.layers import Spec, build, check_spec
from compress.layers.sparse_dictionary import all_atoms
from compress.linalg import largest_per_row
from compress.methods import Site, load
from compress.model import inputs_of
from compress.recipe import Recipe

SHAPES = {
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


def dense_model(shape: str, dtype: torch.dtype, recipe: str | None = None) -> nn.Module:
    """Random numbers in the shape of a model; with a recipe, its layers in place of the linears."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if recipe:
        _replace_linears(model, Recipe.load(recipe))
    model = model.to_empty(device="cpu")
    pattern = torch.randn(1 << 16) * 0.02  # repeated: drawing billions of numbers would take minutes
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            flat = tensor.data.view(-1)
            for start in range(0, len(flat), len(pattern)):
                part = flat[start : start + len(pattern)]
                part.copy_(pattern[: len(part)])
        elif name.endswith(".mask"):
            tensor.copy_(_mask(model.get_submodule(name.removesuffix(".mask")).spec))
        else:
            tensor.random_(0, 256)
    for module in model.modules():  # what to_empty left unset: rotary tables
        if hasattr(module, "rope_init_fn") or hasattr(module, "inv_freq"):
            module.__init__(config)
    model.tie_weights()
    return model.eval()


def _replace_linears(model: nn.Module, recipe: Recipe) -> None:
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        rule = recipe.rule_for(name)
        site = Site(linear.in_features, linear.out_features, *inputs_of(model, name, linear))
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
        spec = {**load(rule.method).plan(site, rule.options), **sizes}
        check_spec(spec)
        with torch.device("meta"):
            model.set_submodule(name, build(spec))


def _mask(spec: Spec) -> torch.Tensor:
    chosen = largest_per_row(torch.rand(spec["out_features"], all_atoms(spec)), spec["num_nonzeros"])
    return pack_mask(chosen)


@torch.inference_mode()
def decode_seconds(model: nn.Module, tokens: int, prompt: torch.Tensor) -> float:
    """Per token, after the prompt."""
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    token = prompt[:, -1:]
    started = time.perf_counter()
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
    return (time.perf_counter() - started) / tokens


@torch.inference_mode()
def prompt_seconds(model: nn.Module, prompt: torch.Tensor) -> float:
    started = time.perf_counter()
    model(prompt, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["gptq-w4", "resq-w4", "cospadi-20", "cospadi-40"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=8, help="decoded in every round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        models = {"dense fp32": dense_model(shape, torch.float32), "dense bf16": dense_model(shape, torch.bfloat16)}
        for recipe in options.recipes:
            models[recipe] = dense_model(shape, torch.bfloat16, recipe)
        prompt = torch.randint(0, 1000, (1, 128))
        decoding: dict[str, list[float]] = {name: [] for name in models}
        reading: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.rounds):
            for name, model in models.items():
                decoding[name].append(decode_seconds(model, options.tokens, prompt[:, :8]))
        for name, model in models.items():  # once: in bf16 it takes minutes on processors that do not multiply it
            reading[name].append(prompt_seconds(model, prompt))
        best = min(median(decoding[name]) for name in ("dense fp32", "dense bf16"))
        first = min(median(reading[name]) for name in ("dense fp32", "dense bf16"))
        for name in models:
            line = {
                "shape": shape,
                "model": name,
                "threads": options.threads,
                "tokens_per_second": round(1 / median(decoding[name]), 2),
                "decode_ratio": round(best / median(decoding[name]), 2),
                "prompt_128_seconds": round(median(reading[name]), 2),
                "prompt_ratio": round(first / median(reading[name]), 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
