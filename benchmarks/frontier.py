"""Quality against size: one table and one plot of what `compress evaluate -o` wrote of several models.

    compress evaluate w4 --against MODEL --dataset C4 --length 512 --windows 24 -o results/w4.c4.json       # and so on
    compress evaluate w4 --dataset TEST --length 1024 --windows 12 -o results/w4.test.json
    python -P benchmarks/frontier.py results/*.json --series "gptq=w[0-9]*" "cospadi=c[0-9]*" --plot frontier.png

A row is one model, a folder; what was measured of it on several texts stands side by side. A series is a line of the plot: a
name and patterns, separated by commas, of the folders' names. The plot shows the KL divergence from the original, of the
text that was evaluated with --against.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def read(files: list[Path]) -> dict[str, dict[str, Any]]:
    """By the folders' names: bits per weight, bytes of the checkpoint, and the quality on every text."""
    models: dict[str, dict[str, Any]] = {}
    for file in files:
        result = json.loads(file.read_text())
        of = result.get("compressed", {})
        if "bits" not in of or "quality" not in of:
            continue  # a dense model, or tasks alone
        entry = models.setdefault(Path(result["model"]).name, {"texts": {}})
        entry.update(bits=of["bits"]["bits_per_weight"], bytes=of["checkpoint_bytes"])
        entry["texts"][Path(result["protocol"]["dataset"]).name] = of["quality"]
    return dict(sorted(models.items(), key=lambda item: -item[1]["bits"]))


def table(models: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for every model."""
    columns: dict[str, dict[str, str]] = {"bits per weight": {}, "checkpoint": {}}
    for name, model in models.items():
        columns["bits per weight"][name] = f"{model['bits']:.2f}"
        columns["checkpoint"][name] = f"{model['bytes'] / 1e6:.1f} MB"
        for text, quality in sorted(model["texts"].items()):
            for what, digits in (("perplexity", (2, 1)), ("kl", (4, 4))):
                if what in quality:
                    value = shown(quality[what], digits[0])
                    if (error := quality[f"{what}_stderr"]) is not None:  # there is none of a single window
                        value += f" ± {error:.{digits[1]}f}"
                    columns.setdefault(f"{what}, {text}", {})[name] = value
    rows = [["model", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(column.get(name, "") for column in columns.values())] for name in models]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def draw(models: dict[str, dict[str, Any]], series: dict[str, list[str]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, patterns), mark in zip(series.items(), "os^Dv*PX" * len(series), strict=False):
        points = [
            (model["bits"], quality["kl"])
            for folder, model in models.items()
            for quality in model["texts"].values()
            if quality.get("kl") is not None and any(fnmatch(folder, pattern) for pattern in patterns)
        ]
        axis.plot(*zip(*points, strict=True), marker=mark, label=name)
    axis.set(yscale="log", xlabel="bits per weight, all included", ylabel="KL from the original (nats per token)")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of `compress evaluate -o`")
    parser.add_argument("--series", nargs="+", default=["all=*"], help="NAME=PATTERN,PATTERN")
    parser.add_argument("--plot", type=Path, help="a file to draw to, .png, .svg or .pdf")
    options = parser.parse_args()
    models = read(options.results)
    print(table(models))
    if options.plot:
        series = dict(line.split("=", 1) for line in options.series)
        draw(models, {name: patterns.split(",") for name, patterns in series.items()}, options.plot)


if __name__ == "__main__":
    main()
