"""The default solver against the paper's OMP + K-SVD, on matrices of a real model, in one process.

Prints one JSON line per matrix and solver: relative error (not squared) of the whitened target and seconds. Default: block 5
of SmolLM2-135M at ratio 0.2, calibrated on 16 x 1024 tokens; K-SVD runs the given number of rounds (the paper: 60).

    python -P benchmarks/solvers.py --text FILE --rounds 60 --modules q_proj k_proj
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calibrate.data import load_texts, make_tokens
from compress.calibrate.statistics import Gram
from compress.linalg import whitening
from compress.methods import Site, cospadi, svd_llm
from compress.solvers import ksvd, orthogonal
from smollm2 import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--modules", nargs="+", default=["q_proj", "k_proj", "gate_proj"])
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, nargs="+", default=[60])
    options = parser.parse_args()

    path = smollm2()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = make_tokens(load_texts(options.text), AutoTokenizer.from_pretrained(path), samples=16, length=1024)
    block = model.model.layers[options.block]
    modules = {
        name.rpartition(".")[2]: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
    }
    grams = {name: Gram(modules[name].in_features) for name in options.modules}
    for name in options.modules:
        modules[name].register_forward_pre_hook(lambda module, args, name=name: grams[name].add(args[0]))
    with torch.inference_mode():
        for ids in tokens.ids.split(4):
            model.model(ids)

    torch.randn(512, 512) @ torch.randn(512, 512)  # the first product starts the threads
    for name in options.modules:
        weight = modules[name].weight.data
        inputs, outputs = weight.shape[1], weight.shape[0]
        target = (whitening(grams[name].mean(), 1e-6)[0] @ weight.double().T).float()
        config = cospadi.Config(dictionary="learned", ratio=options.ratio)
        spec = cospadi.plan(Site(inputs, outputs), config)
        sizes = (spec["num_atoms"], spec["num_nonzeros"])
        values = torch.linalg.svdvals(target.double()).square()
        rank = svd_llm.plan(Site(inputs, outputs), svd_llm.Config(ratio=options.ratio))["rank"]
        _print(name, "svd", {"rank": rank}, float(values[rank:].sum() / values.sum()), None)
        for label, solve in [
            ("orthonormal only", partial(orthogonal.solve, target, *sizes, refits=0)),
            ("default", partial(orthogonal.solve, target, *sizes)),
            *((f"ksvd {n} rounds", partial(ksvd.solve, target, *sizes, iterations=n)) for n in options.rounds),
        ]:
            start = time.perf_counter()
            factors = solve()
            seconds = time.perf_counter() - start
            _print(name, label, {"atoms": sizes[0], "nonzeros": sizes[1]}, factors.relative_error(target), seconds)


def _print(module: str, solver: str, sizes: dict, error: float, seconds: float | None) -> None:
    line = {"module": module, "solver": solver, **sizes, "relative_error": error**0.5, "seconds": seconds}
    print(json.dumps({**line, "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
