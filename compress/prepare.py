"""What is settled before any work: the model opened, the recipe resolved against it, device and dtype chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from compress.complete import by_model_names, require_filled
from compress.errors import CompressError
from compress.forms import require_room
from compress.layers import build
from compress.model import build_skeleton, decoder_blocks, require_compressible
from compress.plan import Plan, block_of, make_plan
from compress.recipe import Recipe
from compress.source import Source, open_source
from compress.tensorfile import StoredTensor

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as configs call their number


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and could start."""

    source: Source
    model: nn.Module
    recipe: Recipe
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    # what the model's output minds, see compress.allocation: of output neurons, by matrix; of tokens, by matrix and block
    sensitivity: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_weights: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the matrices to compress as the checkpoint stores them."""
        return sum(self.source.tensors[f"{job.name}.weight"].num_bytes for job in self.plan.jobs)

    def block_parameters(self, *, active: bool = False) -> list[int]:
        """How many parameters each decoder block has; or how many a token meets there, which is asked of few experts."""
        config = self.model.config.get_text_config(decoder=True)
        experts = next((n for key in _EXPERTS if (n := getattr(config, key, None))), None)
        share = getattr(config, "num_experts_per_tok", experts) / experts if active and experts else 1
        counts = dict.fromkeys(range(self.plan.num_blocks), 0.0)
        for name, tensor in self.source.tensors.items():
            index = block_of(name, self.plan.blocks_name)
            if index in counts:
                counts[index] += (share if ".experts." in name else 1) * (tensor.num_bytes // tensor.dtype.itemsize)
        return [round(count) for count in counts.values()]


def skeleton_of(prepared: Prepared) -> nn.Module:
    """The run's model without weights, with the layers of our own that stand in it (`plan.others`)."""
    skeleton = build_skeleton(prepared.source.path)
    with torch.device("meta"):
        for name, spec in prepared.plan.others.items():
            skeleton.set_submodule(name, build(spec))
    return skeleton


def prepare(model: str | Path, recipe: Recipe, device: str = "auto") -> Prepared:
    """Open the model and resolve the recipe against it; reads no weights but copies of tied ones, and writes nothing."""
    source = open_source(model)
    require_compressible(source)
    skeleton = build_skeleton(source.path)
    source = _by_model_names(source, skeleton)
    source, notes = _used(source, skeleton)
    source, copies = _tied_once(source, skeleton)
    chosen = choose_device(device)
    plan = make_plan(skeleton, source, recipe)
    require_room(skeleton, source, plan)
    plan = replace(plan, notes=plan.notes + notes + copies)
    stored = source.tensors[f"{plan.jobs[0].name}.weight"].dtype
    return Prepared(source, skeleton, recipe, plan, chosen, compute_dtype(chosen, stored))


def _by_model_names(source: Source, skeleton: nn.Module) -> Source:
    """The source by the model's names where its blocks are stored by others: multimodal models, files without a prefix."""
    blocks_name, _ = decoder_blocks(skeleton)
    if any(name.startswith(f"{blocks_name}.") for name in source.tensors):
        return source
    return replace(source, tensors=by_model_names(skeleton, source.tensors))


def _used(source: Source, skeleton: nn.Module) -> tuple[Source, tuple[str, ...]]:
    """The source without tensors that the model has no place for, and a note that says so.

    Raises:
        CompressError: the model would miss a tensor, or lose one of its blocks.
    """
    unused = require_filled(skeleton, source.tensors, source.path)
    blocks_name, _ = decoder_blocks(skeleton)
    for name in unused:
        if name.startswith(f"{blocks_name}.") or name not in source.tensors:
            raise CompressError(
                f"{source.path} holds {name}, for which the model of config.json has no place; "
                "check its num_hidden_layers and architectures, or fetch it again"
            )
    if not unused:
        return source, ()
    used = {name: tensor for name, tensor in source.tensors.items() if name not in unused}
    note = f"left out: {len(unused)} tensors that {type(skeleton).__name__} does not have, the first is {unused[0]}"
    return replace(source, tensors=used), (note,)


def _tied_once(source: Source, skeleton: nn.Module) -> tuple[Source, tuple[str, ...]]:
    """The source without second copies of tied matrices, which a rotation would leave behind, and a note for each.

    Raises:
        CompressError: the copy is none: transformers would untie it, against the config.
    """
    kept, notes = dict(source.tensors), []
    for copy, tied in skeleton.all_tied_weights_keys.items():
        if not {copy, tied} <= kept.keys():
            continue
        if not _same(kept[copy], kept[tied]):
            raise CompressError(
                f"{source.path}: config.json ties {copy} to {tied}, the files hold other numbers for it; "
                "set tie_word_embeddings to false in a copy of the model"
            )
        del kept[copy]
        notes.append(f"left out: {copy}, a copy of {tied}")
    return replace(source, tensors=kept), tuple(notes)


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, a chunk at a time where they are stored alike."""
    if (one.code, one.shape) == (other.code, other.shape):
        return all(mine == its for mine, its in zip(one.chunks(), other.chunks(), strict=True))
    return torch.equal(one.read(), other.read())


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one; CompressError for a device that torch does not offer here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CompressError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise CompressError(f"device {device}: there are no kernels for it; use auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CompressError("device cuda: torch finds no GPU here; use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= (found := torch.cuda.device_count()):
        raise CompressError(f"device {device}: torch finds {found} GPUs here, the first is cuda:0")
    return chosen


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Dtype of the calibration forward passes: as stored where the hardware multiplies it, else fp32."""
    if device.type == "cuda" or stored not in (torch.bfloat16, torch.float16):
        return stored if stored != torch.float64 else torch.float32
    native = stored == torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32
