"""`make demo`: SmolLM2-135M-Instruct in, a smaller checkpoint out, and a table of what it cost. Needs nothing but PyPI.

Where the Hugging Face hub answers, it calibrates and evaluates on WikiText-2; elsewhere on two disjoint parts of the
documentation inside Python itself, and says so.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rich.console import Console

from compress.cli import load_libraries
from compress.console import BarProgress
from compress.errors import CompressError
from compress.evaluate.compare import compare, table
from compress.model import load_for_evaluation
from compress.recipe import Recipe
from compress.run import run
from smollm2 import smollm2

OUTPUT = Path("demo-output")
PROMPTS = ("The capital of France is", "A list in Python is")


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, asked once and quickly instead of through five retries."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def main() -> None:
    console, started = Console(), time.perf_counter()
    load_libraries()
    dataset = "wikitext2" if hub_answers() else "python-docs"
    if dataset == "python-docs":
        console.print("The Hugging Face hub cannot be reached: calibrating and evaluating on disjoint parts of Python's own")
        console.print(
            "documentation, with the model from PyPI (4-bit storage, rounded to bf16). Figures are not WikiText-2's."
        )
    model = smollm2(prefer_hub=dataset == "wikitext2")
    recipe = Recipe.load(
        "cospadi-20",  # without its trials and its search, which take minutes
        [
            f"calibration.dataset={dataset}", "calibration.samples=32", "calibration.length=512",
            "weights.allocation=uniform", "weights.dictionary=identity",
        ],
    )  # fmt: skip
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with BarProgress() as progress:
        report = run(model, recipe, OUTPUT, progress=progress)
    console.print(report.table())
    original, tokenizer = load_for_evaluation(model)
    compressed, _ = load_for_evaluation(OUTPUT)
    console.print(table(compare(compressed, tokenizer, original, dataset=dataset, length=512, windows=12)))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = compressed.generate(**inputs, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"\n[bold]{prompt}[/bold]{text}", highlight=False)
    console.print(f"\nsaved to {OUTPUT}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except CompressError as error:
        sys.exit(str(error))
