"""README.md of a compressed checkpoint: the model card that the hub shows."""

from __future__ import annotations

import re
from pathlib import Path

from compress.report import Report, megabytes


def card(report: Report) -> str:
    """What was made from what, how it is loaded, and what it saves."""
    totals = report.summary()
    methods = ", ".join(sorted({module.method for module in report.modules}))
    base = f"base_model: {report.model}\n" if _is_hub_id(report.model) else ""  # the hub rejects a card that names a path
    origin, dataset = report.calibration.get("origin"), report.recipe.get("calibration", {}).get("dataset")
    texts = "" if origin == dataset else f", with {origin} in place of its data set"
    trials = f", with the trials of {report.trials_from} in place of its own" if report.trials_from else ""
    return f"""---
library_name: transformers
tags: [compressed, subspace-compress]
{base}---

```python
import compress  # first: registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

Compressed with [subspace-compress](https://pypi.org/project/subspace-compress/) {report.versions["compress"]} by {methods}.
The {len(report.modules)} compressed matrices take {megabytes(totals["packed_bytes"])} instead of
{megabytes(totals["dense_bytes"])} in bf16 ({100 * totals["measured_ratio"]:.1f} % fewer bytes), the whole checkpoint
{megabytes(report.checkpoint_bytes)} instead of {megabytes(report.dense_checkpoint_bytes)}.
`recipe.yaml` repeats the run{texts}{trials}, `report.json` holds the figures of every matrix.
"""


def _is_hub_id(model: str) -> bool:
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) and not model.endswith(".gguf")
    return bool(named) and not Path(model).exists()
