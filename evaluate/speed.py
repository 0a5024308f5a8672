"""What a KV cache costs in use: tokens per second of plain decoding behind a prompt, its bytes, and the peak of memory.

One row, one token at a time, as a chat does: evaluation itself feeds many windows and tokens together, and its pace says
nothing about generation. Times are medians, because machines are shared; compare two models of one call only.
Cost: one prompt and `_STEPS` tokens per model.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compress.cache import bytes_in_use
from compress.cache.attached import new_cache
from compress.cache.layer import CACHE_ARGUMENT
from compress.memory import peak_memory_bytes

_STEPS = 16


@torch.inference_mode()
def decoding_speed(model: nn.Module, window: Tensor) -> dict[str, float | int | None]:
    """`tokens_per_second`, `cache_bytes` and `peak_memory_bytes` for token ids `[length]`.

    The peak is the GPU's during this call; on a CPU it is the process's since it began.
    """
    device = next(model.parameters()).device
    ids = window[None].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = new_cache(model) or DynamicCache(config=model.config)
    steps = min(_STEPS, ids.shape[1] - 1)
    seconds, start = [], 0
    for stop in range(ids.shape[1] - steps, ids.shape[1] + 1):
        began = time.perf_counter()
        model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        start = stop
    return {
        "tokens_per_second": 1 / median(seconds[1:]),
        "cache_bytes": bytes_in_use(cache),
        "peak_memory_bytes": peak_memory_bytes(device),
    }
