"""The second half of `benchmarks/gpu.py`: attention on a packed KV cache, and whole models of random numbers.

    attention    one decode step of a layer, packed bytes against torch's attention on the same states in bf16; the error of
                 the former against fp64 first. 32 query heads, 8 KV heads of 128 channels, as in Llama-3-8B.
    decoding     tokens per second of a model, dense and compressed, with a static cache and the step recorded as one CUDA
                 graph, or compiled into one by torch.

Times are medians; one JSON line per case.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import StaticCache

from compress.cache import kivi
from compress.cache.layer import CACHE_ARGUMENT

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; no file here may be called as a package is
from random_models import random_model

HEADS, KV_HEADS, WIDTH = 32, 8, 128
TOTALS = ((1, 65536), (16, 4096))  # batch and tokens of a row: 64k tokens either way
COPIES = 4  # of a packed cache, more than the L2 cache holds
RECIPES = ("gptq-w4", "resq-w4", "resq", "resq-plus", "cospadi-20", "cospadi-40")
PROMPT, ROUNDS = 16, 5


@torch.inference_mode()
def attention(
    device: str, seconds: Callable[[list, torch.Tensor], float] | None, totals: tuple[tuple[int, int], ...] = TOTALS
) -> bool:
    """Print a line per number of bits and batch; whether all were right. `seconds(functions, x)` times them; None: not."""
    good = True
    for bits in (2, 4):
        for batch, tokens in totals:
            layer, query = _random_cache(bits, batch, tokens, device, torch.float32)
            got = layer.attend(query, None, WIDTH**-0.5).transpose(1, 2).double()
            error = float((got - _exact(query, *layer.dense())).norm() / got.norm())
            right = error < 3e-3  # of sums that nearly cancel
            good &= right
            line = {"attention": f"{bits} bits", "batch": batch, "tokens": tokens, "error": error}
            if seconds is not None and right:
                made = [_random_cache(bits, batch, tokens, device, torch.bfloat16) for _ in range(COPIES)]
                query, (keys, values) = made[0][1], made[0][0].dense()
                packed = seconds([lambda x, layer=layer: layer.attend(x, None, WIDTH**-0.5) for layer, _ in made], query)
                plain = seconds([lambda x, k=keys, v=values: _dense(x, k, v)], query)
                line |= {"microseconds": 1e6 * packed, "dense": 1e6 * plain, "ratio": plain / packed}
            print(json.dumps(line), flush=True)
    return good


def _random_cache(bits: int, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[kivi.Layer, torch.Tensor]:
    """A layer of random states, and a query."""
    layer = kivi.Layer(kivi.Config(bits=bits))
    layer.update(*(torch.randn(batch, KV_HEADS, tokens, WIDTH, device=device, dtype=dtype) for _ in range(2)))
    return layer, torch.randn(batch, HEADS, 1, WIDTH, device=device, dtype=dtype)


def _dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """fp64, a row of the batch at a time."""
    rows = zip(query.double(), keys, values, strict=True)
    return torch.stack([_dense(q[None], k[None].double(), v[None].double())[0] for q, k, v in rows])


@torch.inference_mode()
def decoding(
    shapes: list[str], device: str, compiled: bool = False, recipes: tuple[str, ...] = RECIPES, tokens: int = 64
) -> None:
    """Print a line per shape and model."""
    for shape in shapes:
        dense = None
        for recipe in (None, *recipes):
            torch.manual_seed(0)
            model = random_model(shape, torch.bfloat16, recipe, device)
            took = _token_seconds(model, device, tokens, compiled)
            dense = dense or took
            line = {"decoding": recipe or "dense bf16", "model": shape, "compiled": compiled}
            line |= {"tokens_per_second": 1 / took, "ratio": dense / took}
            if device == "cuda":
                line["memory"] = torch.cuda.memory_allocated()
            print(json.dumps(line), flush=True)
            del model
            torch.compiler.reset()


def _token_seconds(model: nn.Module, device: str, tokens: int, compiled: bool) -> float:
    """Median over rounds of the time per token, behind a short prompt."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + tokens + 3)  # two of the recording
    # the positions come as tensors, so that one graph serves every token
    mode = "reduce-overhead" if device == "cuda" else "default"  # the former means CUDA graphs

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = model(token, position_ids=position, **{CACHE_ARGUMENT: cache}).logits
        return logits[:, -1:].argmax(dim=-1)

    fast = torch.compile(step, mode=mode, fullgraph=True) if compiled else None
    times = []
    for number in range(ROUNDS + 1):  # the first compiles or records
        cache.reset()
        token = step(torch.arange(PROMPT, device=device)[None], torch.arange(PROMPT, device=device)[None])
        fast = fast or (recorded(step) if device == "cuda" else step)
        _wait(device)
        started = time.perf_counter()
        for at in range(PROMPT, PROMPT + tokens):
            token = fast(token, torch.tensor([[at]], device=device)).clone()  # a graph writes its output in place
        _wait(device)
        if number:
            times.append((time.perf_counter() - started) / tokens)
    return median(times)


def recorded(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A step of one token as a CUDA graph. What it changes in place changes while it warms up, too."""
    token, position = (torch.zeros(1, 1, dtype=torch.int64, device="cuda") for _ in range(2))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step(token, position)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(token, position)

    def run(new_token: torch.Tensor, new_position: torch.Tensor) -> torch.Tensor:
        token.copy_(new_token)
        position.copy_(new_position)
        graph.replay()
        return found

    return run


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
