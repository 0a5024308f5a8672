"""KIVI whose key errors are kept away from the queries: SQuat.

Paper: SQuat, arXiv:2503.24358; the maths and where it differs is `compress.cache.compensation`, storage that of
`compress.cache.groups`. The second moment of the queries of each KV head comes from one of two places:

    given     `KVCache(model, "squat", metrics={layer: [kv heads, head_dim, head_dim]})`, for example from calibration
    the prompt   otherwise, the queries of the first call: the attention function shows them, `compress.cache.queries`

One metric per row of the batch, so that a row's bytes do not depend on its neighbours; it is fixed when the first group is
packed. A prompt too short to fill a group goes on collecting. Without any query, as when the cache was made from a config,
keys are rounded as in KIVI, and one warning says so.
Cost beside KIVI's: head_dim^2 fp16 numbers per row and head for a metric of the prompt, d^3 per block once.
"""

from __future__ import annotations

import warnings

import torch
from pydantic import Field
from torch import Tensor

from compress.cache import kivi
from compress.cache.buffer import GrowingRows
from compress.cache.compensation import corrections, leading, quantize_groups, visiting_order
from compress.cache.groups import GroupStore
from compress.errors import CompressError

_LARGEST = 60000.0  # of a metric in fp16


class Config(kivi.Config):
    block: int = Field(8, ge=1, description="channels rounded together before the rest is corrected")
    strength: float = Field(10.0, ge=0, description="weight of the queries' moment; 0: KIVI")
    relative: bool = Field(
        True, description="strength counts mean diagonals of the moment; false: the sum over the prompt itself"
    )
    rank: int = Field(0, ge=0, description="leading directions of the moment that are kept; 0: all")
    natural_order: bool = Field(False, description="round channels as they come, not the most queried first")
    cap: float = Field(1.0, gt=0, description="largest entry of a correction matrix")


class QueryStore(GroupStore):
    """A store whose keys are rounded in the metric of the queries."""

    config: Config
    known = (*GroupStore.known, "frozen")

    def __init__(self, config: Config, rows: Tensor, key_states: Tensor, value_states: Tensor, given: Tensor | None) -> None:
        super().__init__(config, rows, key_states, value_states)
        batch, heads, _, width = key_states.shape
        if width % config.block:
            raise CompressError(f"block {config.block} does not divide the head_dim of {width}")
        self.given, self.frozen = None if given is None else _weighted(given, config), given is not None
        self._moves: tuple[Tensor, list[Tensor]] | None = None
        if given is None:
            self.metric = GrowingRows(batch, heads, width * width, torch.float32, key_states.device, 1)
            self.metric.append(torch.zeros(batch, heads, 1, width * width, device=key_states.device))

    def buffers(self) -> list[GrowingRows]:
        return super().buffers() + ([self.metric] if self.given is None else [])

    @property
    def curious(self) -> bool:
        return super().curious or not self.frozen

    def alike(self) -> int:
        return super().alike() if self.frozen else 1

    def observe(self, queries: Tensor) -> None:
        super().observe(queries)
        if not self.frozen:
            self.metric.rows()[:, :, 0] += torch.einsum("bhqtd,bhqte->bhde", queries, queries).flatten(-2)

    def round_keys(self, keys_BHNGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order, moves = self._corrections()
        order = order.expand(*keys_BHNGD.shape[:2], -1)
        by_group = order[:, :, None, None].expand_as(keys_BHNGD)
        codes, scale, minimum = quantize_groups(
            keys_BHNGD.gather(-1, by_group), self.key_bits, self._grid("keys"), self.config.block, moves, self.config.fit
        )
        back = order.argsort(dim=-1)  # what is stored is in the model's order of channels
        by_channel = back[:, :, None].expand_as(scale)
        return (
            codes.gather(-1, back[:, :, None, None].expand_as(codes)),
            scale.gather(-1, by_channel),
            minimum.gather(-1, by_channel),
        )

    def _corrections(self) -> tuple[Tensor, list[Tensor]]:
        if self._moves is None:
            metric = self.given if self.given is not None else self._of_the_prompt()
            order = visiting_order(metric, natural=self.config.natural_order)
            self._moves = order, corrections(metric, order, self.config.block, self.config.cap) if metric.any() else []
        return self._moves

    def _of_the_prompt(self) -> Tensor:
        """The collected moment, weighted, `[batch, heads, head_dim, head_dim]`; it stays from now on, in fp16."""
        shape = (self.head_dim, self.head_dim)
        if not self.frozen:
            self.frozen = True
            metric = self.metric.rows().unflatten(-1, shape).squeeze(2)
            if not metric.any():
                warnings.warn(
                    "squat saw no queries and rounds keys as kivi does; give KVCache the model, not its config, or metrics",
                    stacklevel=2,
                )
            self.metric.data = _weighted(metric, self.config).clamp(-_LARGEST, _LARGEST).flatten(-2).unsqueeze(2).half()
        return self.metric.rows().unflatten(-1, shape).squeeze(2).float()

    def select(self, indices: Tensor) -> None:
        super().select(indices)
        self._moves = None

    def repeat(self, repeats: int) -> None:
        super().repeat(repeats)
        self._moves = None


class Layer(kivi.Layer):
    """One attention layer."""

    config: Config
    takes_metric = True

    def __init__(
        self,
        config: Config,
        key_basis: Tensor | None = None,
        value_basis: Tensor | None = None,
        metric: Tensor | None = None,
    ) -> None:
        super().__init__(config, key_basis, value_basis)
        self.given = metric

    @property
    def metric(self) -> Tensor | None:
        """The moment of the queries `[kv heads, head_dim, head_dim]`, given or the mean over the batch's rows so far."""
        if self.given is not None:
            return self.given
        rows = [store.metric.rows() for store in self.stores]
        if not rows:
            return None
        width = self.stores[0].head_dim
        return torch.cat(rows).float().mean(dim=0).unflatten(-1, (width, width)).squeeze(1)

    def new_store(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> GroupStore:
        _, heads, _, width = key_states.shape
        if self.given is not None and self.given.shape != (heads, width, width):
            raise CompressError(f"a metric of this model is [{heads}, {width}, {width}], got {list(self.given.shape)}")
        return QueryStore(self.config, rows, key_states, value_states, self.given)


def _weighted(metric: Tensor, config: Config) -> Tensor:
    """What is added to the identity, fp32: the moment in its leading directions times the strength."""
    if config.rank:
        metric = leading(metric, config.rank).float()
    if config.relative:
        mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        metric = metric / torch.where(mean > 0, mean, 1)
    return config.strength * metric.float()
