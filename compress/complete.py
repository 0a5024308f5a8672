"""Whether the files of a checkpoint fill the model that config.json describes: a load that reads nothing.

transformers gives a tensor that no file holds random values, leaves out one that has no place in the model, and only warns.
So names, shapes and dtypes first go through transformers' own loading on the meta device, with its renamings, merged experts
and ties, and what it would warn about is an error here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.tensorfile import StoredTensor

_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def require_blocks(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse a config.json that asks for more decoder blocks than are stored, before thousands of them are built.

    Files may hold more: blocks for speculative decoding, which the model does not have. `require_filled` tells them from
    blocks that a damaged config has forgotten.
    """
    numbers = (next((piece for piece in name.split(".") if piece.isdecimal()), "-1") for name in tensors)
    stored = 1 + max(map(int, numbers), default=-1)  # in model.layers.3.mlp.experts.7.w1 the block is the 3
    for key in _BLOCK_COUNTS:
        wanted = config.get(key, stored)
        if not isinstance(wanted, int) or wanted > stored:
            raise CompressError(f"{path}: config.json asks for {wanted!r} blocks ({key}), the files hold {stored}")


def require_filled(model: nn.Module, tensors: Mapping[str, StoredTensor], path: Path) -> list[str]:
    """Names of tensors that have no place in the model, whose parameters are on the meta device and stay as they are.

    Raises:
        CompressError: a parameter would be left without a value, or get one of another shape or kind.
    """
    report = _dry_load(model, tensors)
    for target, source in model.all_tied_weights_keys.items():  # either one fills both
        report.missing_keys -= {target} if {target, source} <= report.missing_keys else {target, source}
    if report.missing_keys:
        raise CompressError(
            f"{path} is incomplete: {_some(report.missing_keys)} missing, which config.json asks for; fetch it again"
        )
    if report.mismatched_keys:
        name, stored, wanted = min(report.mismatched_keys)
        raise CompressError(f"{path} is damaged: {name} is {list(stored)}, config.json asks for {list(wanted)}")
    if report.conversion_errors:
        name = min(report.conversion_errors)
        raise CompressError(f"{path} is damaged: the tensors that make up {name} do not fit together; fetch it again")
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in sorted(floating & set(tensors)):
        if not tensors[name].dtype.is_floating_point:
            raise CompressError(f"{path} is damaged: {name} is {tensors[name].dtype}, a floating point tensor is expected")
    return sorted(report.unexpected_keys)


def by_model_names(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by the names that the model has for them, where transformers only renames what files hold.

    What it builds from several tensors keeps its names, and so does what it would rename once more when it is read again.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    renamings = [change for change in mapping if not isinstance(change, WeightConverter)]

    def renamed(name: str) -> str:
        new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return name if converter else new

    names = {name: renamed(name) for name in tensors}
    return {new if renamed(new) == new else name: tensors[name] for name, new in names.items()}


def require_exact(model: nn.Module, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """As `require_filled`, and nothing may be left over: an entry that config.json has lost would show only there."""
    unexpected = require_filled(model, tensors, path)
    if unexpected:
        raise CompressError(
            f"{path} is damaged: {_some(unexpected)} in its files, for which the model of config.json has no place"
        )


def _dry_load(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    filled = copy.deepcopy(model)
    hollow = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    mapping = get_model_conversion_mapping(filled)
    options = LoadStateDictConfig(device_map={"": "meta"}, dtype_plan={}, weight_mapping=mapping)
    with _no_progress_bar():
        report, _ = convert_and_load_state_dict_in_model(filled, hollow, options)
    filled._adjust_missing_and_unexpected_keys(report)  # what the architecture knows to be absent or superfluous
    return report


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Nothing is loaded, so nothing should say so."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _some(names: Any) -> str:
    """`a is`, or `a and 3 others are`."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} others are" if others else f"{first} is"
