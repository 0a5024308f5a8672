"""KV caches beside the model's plain one: what survives of its answers, and what a token costs.

    python -P benchmarks/kv_cache.py quality MODEL --text FILE [--windows 12 --prompt 512 --decode 512 --caches kivi squat]
    python -P benchmarks/kv_cache.py speed MODEL [--lengths 1024 4096 8192 --caches squat fp8 per_token:bits=4]

**quality.** Every cache decodes the same windows beside the model's plain cache; the prompt is read exactly, the rest as in
generation. Per cache: KL(plain || cache) in nats per decoded token, its ratio to the first cache's with a standard error
paired over windows, top-1 agreement, bits per key or value of what is packed and of everything (window, sinks, metric) at
the end.

**speed.** Every cache is filled with the keys and values that the model computes for random tokens, so that all hold the
same; random queries stand for those of a prompt. Then all decode in turn, one token each, so that a
busy machine slows all of them; a figure is the median over rounds. `peak` is what a token of a cache needs beyond what the
process held before it (Linux), to be read against a full-precision copy of one layer and of all.

`--caches` takes names of `CACHES` or `method:option=value,option=value`; `quanto` and `hqq` are transformers' own quantized
caches at 2 bits in groups of 32 with 32 exact tokens, if their packages are installed (bits of what is packed by
calculation, bits of everything from the tensors that they hold).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from compress.cache import METHODS, KVCache
from compress.cache.layer import CACHE_ARGUMENT
from compress.evaluate.decoding import decode
from compress.evaluate.text import make_windows
from compress.memory import give_back_freed_memory

_PUBLISHED = {
    "bits": 2, "key_bits": 2, "group_size": 32, "value_group_size": 32, "window": 32, "sink_tokens": 0, "affine_bits": 16,
    "fit": 0,
}  # fmt: skip
OWN = ("quanto", "hqq")
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi as published": ("kivi", _PUBLISHED),
    "squat as published": (
        "squat",
        _PUBLISHED | {"block": 32, "strength": 1e-3, "relative": False, "rank": 20, "natural_order": True, "cap": 1e9},
    ),
    "squat": ("squat", {}),
}


def new_cache(model: nn.Module, name: str) -> Any:
    """An empty cache: `plain`, a backend of transformers, a name of `CACHES`, or a method with options."""
    if name == "plain":
        return DynamicCache(config=model.config)
    if name in OWN:
        cache = QuantizedCache(backend=name, config=model.config, nbits=2, q_group_size=32, residual_length=32)
        cache.alike = lambda: 1  # it rounds again whenever its window is full
        return cache
    method, _, options = name.partition(":")
    if name not in CACHES and method not in METHODS:
        raise SystemExit(f"expected one of {', '.join(CACHES)}, or one of {', '.join(METHODS)} with options, got {name!r}")
    pairs = (pair.split("=") for pair in options.split(",") if pair)
    method, chosen = CACHES.get(name) or (method, {key: json.loads(value) for key, value in pairs})
    return KVCache(model, method, **chosen)


def measure(model: nn.Module, windows: Tensor, prompt: int, batch: int, name: str) -> dict:
    """Columns `[windows]` of one cache, its bits and seconds per decoded token."""
    columns: dict[str, list[Tensor]] = {}
    began = time.perf_counter()
    for ids in windows.split(batch):
        cache = new_cache(model, name)
        for column, total in decode(model, cache, ids, model, prompt).items():
            columns.setdefault(column, []).append(total / (ids.shape[1] - prompt))
    seconds = (time.perf_counter() - began) / (len(windows) * (windows.shape[1] - prompt))
    found = {column: torch.cat(parts) for column, parts in columns.items()}
    packed = cache.packed_bits_per_element if isinstance(cache, KVCache) else 3.0
    return found | {"bits": bits_of(cache), "packed_bits": packed, "seconds": seconds}


def held(stored: Any) -> list[Tensor]:
    """Every plain tensor in whatever a backend of transformers holds: tensors of its own kind, tuples, dictionaries."""
    if isinstance(stored, Tensor) and hasattr(stored, "__tensor_flatten__"):
        return [part for name in stored.__tensor_flatten__()[0] for part in held(getattr(stored, name))]
    if isinstance(stored, Tensor):
        return [stored]
    parts = stored.values() if isinstance(stored, dict) else stored if isinstance(stored, (tuple, list)) else ()
    return [tensor for part in parts for tensor in held(part)]


def bits_of(cache: Any) -> float:
    """Bits per key or value in packed layers, everything counted; exact states count 16, whatever the dtype of this run, and
    so do the scales of other backends, which take the dtype of the run."""
    total, elements = 0, 0
    if not isinstance(cache, KVCache):
        for layer in cache.layers:
            stored = [
                layer.keys,
                layer.values,
                getattr(layer, "_quantized_keys", ()),
                getattr(layer, "_quantized_values", ()),
            ]
            total += sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in held(stored))
            batch, heads, _, width = layer.keys.shape
            elements += 2 * batch * heads * width * layer.get_seq_length()
        return 8 * total / elements
    for layer in cache.packed:
        exact = layer.numel() - layer.packed_size()[1]
        total += layer.nbytes - exact * layer.dtype.itemsize + 2 * exact
        elements += layer.numel()
    return 8 * total / elements


def quality(args: argparse.Namespace) -> None:
    """Print the table, write it as JSON if asked."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = make_windows(args.text, tokenizer, length=args.prompt + args.decode, limit=args.windows).ids
    table = Table("cache", "KL", "of the first", "top-1", "bits packed", "bits, all", "perplexity")
    first, rows = None, {}
    with torch.inference_mode():
        for name in args.caches:
            found = measure(model, windows, args.prompt, args.batch, name)
            kl = found["kl"]
            first = kl if first is None else first
            ratio = float(kl.mean() / first.mean())
            error = float((kl - ratio * first).std() / first.mean()) / len(kl) ** 0.5  # of a ratio of means
            rows[name] = {
                "kl": float(kl.mean()), "kl_stderr": float(kl.std()) / len(kl) ** 0.5,
                "ratio": ratio, "ratio_stderr": error, "agreement": float(found["agreement"].mean()),
                "packed_bits": found["packed_bits"], "bits": found["bits"],
                "perplexity": float(found["nll"].mean().exp()), "plain_perplexity": float(found["original"].mean().exp()),
                "seconds_per_token": found["seconds"],
            }  # fmt: skip
            row = rows[name]
            table.add_row(
                name, f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}", f"{ratio:.3f} ± {error:.3f}", f"{row['agreement']:.1%}",
                f"{row['packed_bits']:.2f}", f"{row['bits'] or 0:.2f}", f"{row['perplexity']:.2f}",
            )  # fmt: skip
            print(name, json.dumps(rows[name]), flush=True)
    table.caption = f"perplexity of the plain cache {row['plain_perplexity']:.2f}"
    Console(width=150).print(table)
    if args.output:
        args.output.write_text(json.dumps({"windows": len(windows), "rows": rows}, indent=1))


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def step(model: nn.Module, cache: Any, token: torch.Tensor) -> tuple[float, int]:
    """Seconds of one token, and how far the process grew meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = status("VmRSS:"), time.perf_counter()
    model(token, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return time.perf_counter() - began, status("VmHWM:") - before


def speed(args: argparse.Namespace) -> None:
    """One table per length."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        ids = torch.randint(0, vocabulary, (1, max(args.lengths)), generator=generator)
        full = DynamicCache(config=model.config)
        for part in ids.split(512, dim=1):
            model(part, **{CACHE_ARGUMENT: full}, use_cache=True, logits_to_keep=1)
        for length in args.lengths:
            caches = {name: new_cache(model, name) for name in ["plain", *args.caches]}
            for cache in caches.values():
                for index, layer in enumerate(full.layers):
                    cache.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
                for layer in getattr(cache, "packed", ()):
                    if layer.watched:
                        layer.see(torch.randn(1, layer.shape["heads"], 512, layer.shape["head_dim"]), None)
            table = Table("cache", "ms/token", "of plain", "bytes of bf16", "peak MB", title=f"{length} tokens")
            seconds = {name: [] for name in caches}
            peaks = dict.fromkeys(caches, 0)
            for index in range(args.rounds):
                token = ids[:, index : index + 1]
                for name, cache in caches.items():
                    give_back_freed_memory()
                    took, grown = step(model, cache, token)
                    seconds[name].append(took)
                    peaks[name] = max(peaks[name], grown) if index else 0
            plain = median(seconds["plain"])
            for name, cache in caches.items():
                took = median(seconds[name])
                size = f"{bits_of(cache) / 16:.1%}"
                table.add_row(name, f"{1e3 * took:.1f}", f"{took / plain:.2f}", size, f"{peaks[name] / 1e6:.0f}")
            layer = 4 * 2 * full.layers[-1].keys[:, :, :length].numel() / 1e6
            table.caption = f"an fp32 copy of one layer {layer:.0f} MB, of all {layer * len(full.layers):.0f} MB"
            Console(width=110).print(table)


def main() -> None:
    """`quality` or `speed`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, caches in ((quality, list(CACHES)), (speed, ["squat", "kivi as published", "per_token:bits=4", "fp8"])):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("model")
        command.add_argument("--caches", nargs="+", default=caches)
        command.add_argument("--dtype", default="float32")
        if run is quality:
            command.add_argument("--text", required=True)
            command.add_argument("--windows", type=int, default=12)
            command.add_argument("--prompt", type=int, default=512)
            command.add_argument("--decode", type=int, default=512)
            command.add_argument("--batch", type=int, default=4)
            command.add_argument("--output", type=Path)
        else:
            command.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
            command.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
