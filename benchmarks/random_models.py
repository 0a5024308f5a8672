"""Models of random numbers in the shapes of real ones, dense or with the layers that a recipe plans.

Speed does not depend on the numbers, so it is measured without fetching or compressing anything.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.kernels.sparse_dictionary import pack_mask
from compress.layers import build, check_spec
from compress.layers.sparse_dictionary import all_atoms
from compress.linalg import largest_per_row
from compress.methods import Site, load
from compress.model import inputs_of
from compress.recipe import Recipe

SHAPES = {
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "tiny": {  # to try a benchmark itself
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, recipe: str | None = None, device: str = "cpu") -> nn.Module:
    """Random numbers in the shape of a model; with a recipe, its layers in place of the linears."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if recipe:
        _replace_linears(model, Recipe.load(recipe))
    model = model.to_empty(device=device)
    pattern = torch.randn(1 << 16, device=device) * 0.02  # repeated: drawing billions of numbers would take minutes
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            flat = tensor.data.view(-1)
            for start in range(0, len(flat), len(pattern)):
                part = flat[start : start + len(pattern)]
                part.copy_(pattern[: len(part)])
        elif name.endswith(".mask"):
            spec = model.get_submodule(name.removesuffix(".mask")).spec
            tensor.copy_(_mask(spec["out_features"], all_atoms(spec), spec["num_nonzeros"], device))
        else:
            tensor.random_(0, 256)
    for module in model.modules():  # what to_empty left unset: rotary tables
        if hasattr(module, "rope_init_fn") or hasattr(module, "inv_freq"):
            module.__init__(config)
            module.to(device)
    model.tie_weights()
    return model.eval()


def _replace_linears(model: nn.Module, recipe: Recipe) -> None:
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        rule = recipe.rule_for(name)
        site = Site(linear.in_features, linear.out_features, *inputs_of(model, name, linear))
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
        spec = {**load(rule.method).plan(site, rule.options), **sizes}
        check_spec(spec)
        with torch.device("meta"):
            model.set_submodule(name, build(spec))


@cache  # the same for all layers of a shape; kept on the CPU, so that no later model's memory counts it
def _mask(rows: int, atoms: int, nonzeros: int, device: str) -> torch.Tensor:
    return pack_mask(largest_per_row(torch.rand(rows, atoms, device=device), nonzeros)).cpu()
