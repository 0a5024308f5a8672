"""Peak memory of compressing a checkpoint that is larger than the memory it may use.

Writes a random Llama checkpoint of `--gigabytes` (tensor by tensor; nothing large is ever held), compresses it in a process
of its own and prints that process's peak resident memory as one JSON line. Weights are random: only bytes and memory
mean anything here. CoSpaDi's solver is cut short by default, which changes the time and not the memory.

    python -P benchmarks/memory.py --recipe rtn-w4        # 47 minutes on one busy core; cospadi-20 is the default
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

HIDDEN, INTERMEDIATE = 1024, 1024


def synthetic_checkpoint(path: Path, gigabytes: float) -> int:
    """A bf16 Llama directory of at least so many bytes, one shard per 16 blocks; returns its bytes."""
    from transformers import AutoTokenizer, LlamaConfig

    from compress.fetch import INDEX
    from compress.jsonfile import write_json
    from compress.tensorfile import write_file
    from smollm2 import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    per_block = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
    blocks = int(gigabytes * 1e9 / per_block) + 1
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HIDDEN // 64,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    path.mkdir(parents=True)
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    weight_map, total = {}, 0

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        write_file(path / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    write(
        "outer.safetensors",
        {"model.embed_tokens.weight": random(len(tokenizer), HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16()},
    )
    for start in range(0, blocks, 16):
        tensors = {}
        for block in range(start, min(start + 16, blocks)):
            prefix = f"model.layers.{block}."
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
                tensors[f"{prefix}{name}.weight"] = random(HIDDEN, HIDDEN)
            tensors[f"{prefix}mlp.gate_proj.weight"] = random(INTERMEDIATE, HIDDEN)
            tensors[f"{prefix}mlp.up_proj.weight"] = random(INTERMEDIATE, HIDDEN)
            tensors[f"{prefix}mlp.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        write(f"blocks-{start:05d}.safetensors", tensors)
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", help="where three times the checkpoint fits; default: the folder for temporary files")
    parser.add_argument("--recipe", default="cospadi-20")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--refits", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = synthetic_checkpoint(Path(folder) / "model", options.gigabytes)
        print(f"checkpoint of {size / 1e9:.2f} GB written", flush=True)
        settings = {"calibration.dataset": "python-docs", "calibration.samples": 8, "calibration.length": 1024}
        if options.recipe.startswith("cospadi"):
            settings |= {"weights.iterations": options.iterations, "weights.refits": options.refits}
        overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        start = time.perf_counter()
        command = [str(Path(sys.executable).parent / "compress"), "model", f"{folder}/model", "--recipe", options.recipe]
        done = subprocess.run([*command, "-o", f"{folder}/out", *overrides], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    line = {
        "checkpoint_bytes": size,
        "peak_rss_bytes": peak,
        "seconds": round(seconds),
        "recipe": options.recipe,
        **settings,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
