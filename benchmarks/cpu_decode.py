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
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import DynamicCache

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; no file here may be called as a package is
from random_models import SHAPES, random_model


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
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["gptq-w4", "resq-w4", "cospadi-20", "cospadi-40"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=8, help="decoded in every round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        models = {"dense fp32": random_model(shape, torch.float32), "dense bf16": random_model(shape, torch.bfloat16)}
        for recipe in options.recipes:
            models[recipe] = random_model(shape, torch.bfloat16, recipe)
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
