"""The compressed checkpoint: written from blocks and the original's untouched tensors, loaded.

A normal Hugging Face directory whose config.json carries

    "quantization_config": {"quant_method": "compress", "version": ..., "modules": {name: spec}}
    "transformers_weights": a sentence that names the import

Transformers only warns about an unknown quant_method and would then run random weights. `transformers_weights` normally
names the weight file; as a sentence it makes plain transformers raise an error that shows it, and `compress.hf` removes
it on loading.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from compress.card import card
from compress.errors import CompressError, readable_errors
from compress.fetch import INDEX
from compress.jsonfile import read_json, write_json
from compress.layers import dense_bytes, layer_class
from compress.model import read_config
from compress.plan import Plan
from compress.recipe import Recipe
from compress.report import Report
from compress.source import RECIPE, REPORT, Source, open_source
from compress.tensorfile import StoredTensor, read_header, write_file, write_whole
from compress.verify import FORMAT_VERSION, module_specs, require_shapes
from compress.version import __version__

GUARD = (
    "this is a compressed checkpoint; run `import compress` (pip install subspace-compress) before from_pretrained, "
    "or make a dense copy with `compress export`"
)


def versions() -> dict[str, str]:
    """What made this result."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {"compress": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def assemble(
    source: Source, plan: Plan, block_files: list[Path], report: Report, recipe: Recipe, output: Path, max_shard_bytes: int
) -> Report:
    """Write the complete checkpoint directory; returns the report with the sizes of both checkpoints filled in."""
    shutil.rmtree(output, ignore_errors=True)  # left by a run that was killed here
    output.mkdir()
    replaced = {f"{job.name}.weight" for job in plan.jobs}
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in replaced}
    for file in block_files:  # packed layers, and what a rotation changed
        tensors.update(read_header(file))
    total = write_shards(output, tensors, max_shard_bytes)
    report = replace(report, checkpoint_bytes=total, dense_checkpoint_bytes=source.stored_bytes)
    quantization = {
        "quant_method": "compress",
        "version": FORMAT_VERSION,
        "modules": {job.name: job.spec for job in plan.jobs} | plan.others,
    }
    if plan.cache:
        quantization["kv_cache"] = plan.cache
    config = {**source.config, "quantization_config": quantization, "transformers_weights": GUARD}
    if not (config.get("dtype") or config.get("torch_dtype")):  # transformers would go by the first tensor, a basis perhaps
        config["dtype"] = _stored_dtype(source)
    source.copy_side_files(output)
    write_json(output / "config.json", config)
    write_json(output / REPORT, report.to_dict())
    write_whole(output / RECIPE, [recipe.to_yaml().encode()])
    write_whole(output / "README.md", [card(report).encode()])
    return report


def _stored_dtype(source: Source) -> str:
    """The dtype that most bytes of a model are stored in, for a config.json that names none."""
    counts: dict[str, int] = {}
    for tensor in source.tensors.values():
        if tensor.dtype.is_floating_point:
            name = str(tensor.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + tensor.num_bytes
    return max(counts, key=counts.__getitem__)


def write_shards(output: Path, tensors: dict[str, StoredTensor], max_shard_bytes: int) -> int:
    """Write tensors as one file, or as numbered shards with an index; returns their bytes."""
    shards: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if len(shards) == 1:
        write_file(output / "model.safetensors", shards[0])
        return total
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(output / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def load(path: str | Path, *, device_map: Any = None, dtype: Any = "auto") -> nn.Module:
    """A compressed checkpoint as a transformers model in eval mode; other arguments as in `from_pretrained`.

    Raises:
        CompressError: not a compressed checkpoint, incomplete or damaged.
    """
    from transformers import AutoModelForCausalLM

    import compress.hf  # noqa: F401  registers the format with transformers

    source = open_source(path)
    module_specs(source.config)
    read_config(source)
    with readable_errors(source.path):
        return AutoModelForCausalLM.from_pretrained(source.path, device_map=device_map, dtype=dtype)


def read_report(path: str | Path) -> Report:
    """The figures recorded with a compressed checkpoint, or its sizes alone where the report is gone.

    Raises:
        CompressError: not a compressed checkpoint, or a damaged one.
    """
    source = open_source(path)
    specs, file = module_specs(source.config), source.path / REPORT
    if file.is_file():
        try:
            return Report.from_dict(read_json(file))
        except (KeyError, TypeError) as error:
            raise CompressError(f"{file} is damaged: {error}; without it, sizes alone are shown") from error
    require_shapes(source.path, source.tensors, specs)
    packed = {f"{name}.{key}" for name, spec in specs.items() for key in layer_class(spec["format"]).tensors(spec)}
    stored = sum(tensor.num_bytes for tensor in source.tensors.values())
    matrices = {name: spec for name, spec in specs.items() if spec["format"] != "rotated_norm"}
    ours = sum(tensor.num_bytes for name, tensor in source.tensors.items() if name in packed)
    return Report.of_specs(matrices, stored, stored - ours + sum(map(dense_bytes, matrices.values())))
