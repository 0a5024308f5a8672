"""Methods that compress weights. The folder is the registry: `method: foo` in a recipe means `compress/methods/foo.py`.

A method file holds

    class Config(MethodConfig)                        its options, each documented
    plan(site, config) -> dict                        the storage spec it will use, from the layer's sizes and place
    compress(weight_NI, inputs: SecondMoment, spec, config) -> dict[str, Tensor]    the packed tensors of that spec

and nothing else is edited to add one. `plan` raises ValueError when the sizes cannot meet the ratio. Four functions are
optional, where options leave something to be decided for each matrix by trial (`compress.trials`):

    kinds(site, config) -> list[Config]               forms to compare at equal bytes
    alternatives(site, config) -> list[Config]        sizes to try of one form, each settling everything
    quick(config) -> Config                           the same at less expense, for the trial
    solves_neurons_alone(config) -> bool              whether a sample of the neurons tells what all of them would cost
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compress.errors import CompressError
from compress.suggest import unknown

MAX_SEED = 2**63 - 1  # what every random generator takes


class MethodConfig(BaseModel):
    """Base of every method's options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def fills_its_share(self) -> bool:
        """Whether trials decide how a matrix fills the bytes that `ratio` leaves it, so that a plan counts all of those."""
        return False


@dataclass(frozen=True)
class Site:
    """A linear layer as `plan` sees it: its sizes and what it reads.

    `inputs` is "stream" for the normalised residual stream (q, k, v, gate, up), "heads" for attention heads side by side
    (o_proj; then `heads` counts them), "hidden" for the inside of the MLP (down_proj), "other" for anything else.
    """

    in_features: int
    out_features: int
    inputs: Literal["stream", "heads", "hidden", "other"] = "other"
    heads: int = 0


def names() -> list[str]:
    """The methods in this folder, without importing them; a leading underscore marks what several methods share."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """Import one method; an unknown name is answered with the nearest one, an import error is let through."""
    if name not in names():
        raise CompressError(unknown("method", name, names()))
    return importlib.import_module(f"compress.methods.{name}")


def bf16(tensor: Tensor) -> Tensor:
    """The one cast of the factors to their storage dtype."""
    return tensor.to(torch.bfloat16).contiguous()
