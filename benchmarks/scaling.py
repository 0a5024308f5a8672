"""How the time of one matrix grows: the default CoSpaDi solver on square matrices of growing width, at ratio 0.2.

One JSON line per width: seconds, the operations that the formulas of `cospadi.flops` count (which --dry-run turns into a
time), and the exponent between neighbouring widths, measured and by formula. Random weights and power-law inputs: the cost
does not depend on the numbers.

    python -P benchmarks/scaling.py --widths 256 512 1024 2048
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from math import log2

import torch

from compress.linalg import SecondMoment
from compress.methods import Site, cospadi


def measure(width: int) -> dict:
    """Seconds and counted operations of `cospadi.compress` for a `[width, width]` matrix."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2 * width, width, generator=generator) * torch.logspace(0, -2, width)
    weight = torch.randn(width, width, generator=generator)
    config = cospadi.Config(dictionary="learned", ratio=0.2)
    spec = cospadi.plan(Site(width, width), config)
    inputs = SecondMoment((x.T @ x / len(x)).double())
    start = time.perf_counter()
    cospadi.compress(weight, inputs, spec, config)
    seconds = time.perf_counter() - start
    sizes = {"width": width, "atoms": spec["num_atoms"], "nonzeros": spec["num_nonzeros"]}
    return {**sizes, "seconds": seconds, "operations": cospadi.flops(width, width, spec, config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options = parser.parse_args()
    measure(256)  # the first product starts the threads
    rows = [measure(width) for width in options.widths]
    for before, row in pairwise([None, *rows]):
        if before:
            steps = log2(row["width"] / before["width"])
            row["exponent"] = log2(row["seconds"] / before["seconds"]) / steps
            row["exponent_by_formula"] = log2(row["operations"] / before["operations"]) / steps
        print(json.dumps({**row, "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
