"""How much of a model's answers survives its KV cache: divergence by teacher-forced decoding, bits and speed, in one table.

    python -P benchmarks/kv_cache.py MODEL --text FILE [--windows 12 --prompt 512 --decode 512 --caches kivi squat ...]

Every cache decodes the same windows beside the model's plain cache; the prompt is read exactly, the rest as in generation.
Per cache: KL(plain || cache) in nats per decoded token, its ratio to the first cache's with a standard error paired over
windows, top-1 agreement, bits per key or value of what is packed and of everything (window, sinks, metric) at the end.
`--caches` takes names of `CACHES` or `method:option=value,option=value`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.cache import METHODS, KVCache
from compress.evaluate.decoding import decode
from compress.evaluate.text import make_windows

_PUBLISHED = {"bits": 2, "group_size": 32, "value_group_size": 32, "window": 32, "sink_tokens": 0}
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi as published": ("kivi", _PUBLISHED),
    "squat as published": (
        "squat",
        _PUBLISHED | {"block": 32, "strength": 1e-3, "relative": False, "rank": 20, "natural_order": True, "cap": 1e9},
    ),
    "squat": ("squat", {"bits": 2}),
}


def parsed(text: str) -> tuple[str, tuple[str, dict[str, Any]]]:
    """A name of `CACHES`, or a method with options."""
    if text in CACHES:
        return text, CACHES[text]
    method, _, options = text.partition(":")
    if method not in METHODS:
        raise SystemExit(f"expected one of {', '.join(CACHES)}, or one of {', '.join(METHODS)} with options, got {text!r}")
    pairs = (pair.split("=") for pair in options.split(",") if pair)
    return text, (method, {name: json.loads(value) for name, value in pairs})


def measure(model: nn.Module, windows: Tensor, prompt: int, batch: int, method: str, options: dict[str, Any]) -> dict:
    """Columns `[windows]` of one cache, its bits and seconds per decoded token."""
    columns: dict[str, list[Tensor]] = {}
    began = time.perf_counter()
    for ids in windows.split(batch):
        cache = KVCache(model, method, **options)
        for name, total in decode(model, cache, ids, model, prompt).items():
            columns.setdefault(name, []).append(total / (ids.shape[1] - prompt))
    seconds = (time.perf_counter() - began) / (len(windows) * (windows.shape[1] - prompt))
    found = {name: torch.cat(parts) for name, parts in columns.items()}
    return found | {"bits": bits_of(cache), "packed_bits": cache.packed_bits_per_element, "seconds": seconds}


def bits_of(cache: KVCache) -> float:
    """Bits per key or value in packed layers, everything counted; exact states count 16, whatever the dtype of this run."""
    total, elements = 0, 0
    for layer in cache.packed:
        exact = layer.numel() - layer.packed_size()[1]
        total += layer.nbytes - exact * layer.dtype.itemsize + 2 * exact
        elements += layer.numel()
    return 8 * total / elements


def main() -> None:
    """Print the table, write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--caches", nargs="+", default=list(CACHES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = make_windows(args.text, tokenizer, length=args.prompt + args.decode, limit=args.windows).ids
    table = Table("cache", "KL", "of the first", "top-1", "bits packed", "bits, all", "perplexity")
    first, rows = None, {}
    with torch.inference_mode():
        for name, (method, options) in map(parsed, args.caches):
            found = measure(model, windows, args.prompt, args.batch, method, options)
            kl = found["kl"]
            first = kl if first is None else first
            ratio = float(kl.mean() / first.mean())
            error = float((kl - ratio * first).std() / first.mean()) / len(kl) ** 0.5  # of a ratio of means
            rows[name] = {
                "method": method, "options": options, "kl": float(kl.mean()), "kl_stderr": float(kl.std()) / len(kl) ** 0.5,
                "ratio": ratio, "ratio_stderr": error, "agreement": float(found["agreement"].mean()),
                "packed_bits": found["packed_bits"], "bits": found["bits"],
                "perplexity": float(found["nll"].mean().exp()), "plain_perplexity": float(found["original"].mean().exp()),
                "seconds_per_token": found["seconds"],
            }  # fmt: skip
            row = rows[name]
            table.add_row(
                name, f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}", f"{ratio:.3f} ± {error:.3f}", f"{row['agreement']:.1%}",
                f"{row['packed_bits']:.2f}", f"{row['bits']:.2f}", f"{row['perplexity']:.2f}",
            )  # fmt: skip
            print(name, json.dumps(rows[name]), flush=True)
    table.caption = f"perplexity of the plain cache {row['plain_perplexity']:.2f}"
    Console(width=150).print(table)
    if args.output:
        args.output.write_text(json.dumps({"windows": len(windows), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
