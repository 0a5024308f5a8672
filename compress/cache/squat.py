"""KIVI whose key errors are kept away from the queries: SQuat.

Paper: SQuat, arXiv:2503.24358; the maths and where it differs is `compress.cache.compensation`, storage that of
`compress.cache.groups`. The second moment of the queries of each KV head comes from one of two places:

    given     `KVCache(model, "squat", metrics={layer: [kv heads, head_dim, head_dim]})`, from calibration, a text of one's
              own (`compress.cache.query_moments`) or the weights (`compress.cache.from_weights`)
    the prompt   otherwise, the queries of the first call: the attention function shows them, `compress.cache.queries`

One metric per row of the batch, so that a row's bytes do not depend on its neighbours; it is fixed when the first group is
packed. A prompt too short to fill a group goes on collecting. Without any query, as when the cache was made from a config,
keys are rounded as in KIVI, and one warning says so.
Cost beside KIVI's: about head_dim^2 / 2 bytes per row and head, d^3 per block once.
"""

from __future__ import annotations

import warnings

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from compress.cache import kivi
from compress.cache.buffer import GrowingRows
from compress.cache.compensation import corrections, leading, visiting_order
from compress.cache.groups import GroupStore
from compress.errors import CompressError
from compress.kernels.group_packing import behind

Corrections = tuple[Tensor, Tensor]  # the order of the channels, and the matrices in it one after the other

_DECIDE = ("block", "strength", "relative", "rank", "natural_order", "cap")
_known_corrections = WeakTensorKeyDictionary()  # of given metrics


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
    """A store whose keys are rounded in the metric of the queries.

    The metric of a prompt is one fp32 row of head_dim^2 numbers until the first group is packed. From then on its correction
    matrices take its place: a row of int8, and a row with the order of the channels and what 127 stands for. A given metric
    is the model's and not the conversation's: order `[1, heads, head_dim]` and corrections are the layer's.
    """

    config: Config
    known = (*GroupStore.known, "frozen")

    def __init__(
        self, config: Config, rows: Tensor, key_states: Tensor, value_states: Tensor, given: Corrections | None
    ) -> None:
        super().__init__(config, rows, key_states, value_states)
        batch, heads, _, width = key_states.shape
        self.given, self.frozen, device = given, given is not None, key_states.device
        moved = sum(size * config.block for size in behind(width, config.block))
        wide = [0, 0, 0] if self.frozen else [width * width, width + 1, moved]
        dtypes = (torch.float32, torch.float32, torch.int8)
        self.metric, self.order, self.moves = (
            GrowingRows(batch, heads, row, dtype, device, 1) for row, dtype in zip(wide, dtypes, strict=True)
        )
        self.metric.append(torch.zeros(*self.metric.data.shape, device=device))

    def buffers(self) -> list[GrowingRows]:
        return [*super().buffers(), self.metric, self.order, self.moves]

    def curious(self, new: int) -> bool:
        return super().curious(new) or not (self.frozen or self.config.bits == 16)

    def alike(self) -> int:
        return super().alike() if self.frozen or self.config.bits == 16 else 1

    def observe(self, queries: Tensor) -> None:
        if not self.frozen:
            self.metric.rows()[:, :, 0] += torch.einsum("bhqtd,bhqte->bhde", queries, queries).flatten(-2)

    def moment(self) -> Tensor:
        """Sum over the queries so far, `[batch, heads, head_dim, head_dim]` fp32; only before anything is packed."""
        return self.metric.rows().unflatten(-1, (self.head_dim, -1)).squeeze(2)

    def compensation(self) -> tuple[Tensor | None, Tensor | None, int]:
        if not self.frozen:
            moment = self.moment()
            if not moment.any():
                warnings.warn(
                    "squat saw no queries and rounds keys as kivi does; give KVCache metrics, or the model, with sdpa",
                    stacklevel=2,
                )
            self._freeze(_weighted(moment, self.config))
        order, moves = self.given or self._corrections()
        return (order, moves, self.config.block) if moves.shape[-1] else super().compensation()

    def _freeze(self, metric: Tensor) -> None:
        """Put the corrections in the metric's place."""
        order, moves = _computed(metric, self.config)
        unit = moves.abs().amax(dim=-1, keepdim=True) / 127 if moves.shape[-1] else moves.new_zeros(*moves.shape[:2], 1)
        self.order.append(torch.cat([order.float(), unit], dim=-1).unsqueeze(2))
        self.moves.append((moves / torch.where(unit > 0, unit, 1)).round().to(torch.int8).unsqueeze(2))
        self.metric.data, self.frozen = self.metric.data[..., :0].clone(), True

    def _corrections(self) -> Corrections:
        """The order and the corrections as they are stored."""
        row = self.order.rows()[:, :, 0]
        return row[..., :-1].long(), self.moves.rows()[:, :, 0].float() * row[..., -1:]


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

    def moment(self) -> Tensor:
        """Sum of the queries' outer products over the batch so far, `[kv heads, head_dim, head_dim]`."""
        return torch.cat([store.moment() for store in self.stores]).sum(dim=0)

    def new_store(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> GroupStore:
        _, heads, _, width = key_states.shape
        if width % self.config.block:
            raise CompressError(f"block {self.config.block} does not divide the head_dim of {width}")
        shared = None
        if self.given is not None:
            if self.given.shape != (heads, width, width):
                raise CompressError(f"a metric of this model is [{heads}, {width}, {width}], got {list(self.given.shape)}")
            shared = _of_given(self.given, self.config, key_states.device)
        return QueryStore(self.config, rows, key_states, value_states, shared)

    def require_whole(self) -> None:
        super().require_whole()
        if any(store.frozen and store.given is None and not store.order.data.shape[3] for store in self.stores):
            raise CompressError("saved by a cache with metrics; give KVCache the same ones")


def _computed(metric: Tensor, config: Config) -> Corrections:
    order = visiting_order(metric, natural=config.natural_order)
    moves = corrections(metric, order, config.block, config.cap)
    none = metric.new_zeros(*metric.shape[:2], 0, dtype=torch.float32)  # one block is all of the head
    return order, torch.cat([none, *(move.flatten(2) for move in moves)], dim=-1)


def _of_given(metric_HDD: Tensor, config: Config, device: torch.device) -> Corrections:
    """Of a metric that belongs to the model: computed once, however many caches are made with it.

    What is written into it through `.data` is not seen; tensors made in inference mode, which count no changes, are
    computed every time.
    """
    if metric_HDD.is_inference():
        return _computed(_weighted(metric_HDD[None].to(device), config), config)
    key = (metric_HDD._version, str(device), *(getattr(config, name) for name in _DECIDE))
    known = _known_corrections.setdefault(metric_HDD, {})
    found = known.get(key)
    if found is None:
        known.clear()  # changed since, or another device
        found = known[key] = _computed(_weighted(metric_HDD[None].to(device), config), config)
    return found


def _weighted(metric: Tensor, config: Config) -> Tensor:
    """What is added to the identity, fp32: the moment in its leading directions times the strength."""
    if config.rank:
        metric = leading(metric, config.rank).float()
    if config.relative:
        mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        metric = metric / torch.where(mean > 0, mean, 1)
    return config.strength * metric.float()
