"""KIVI whose key errors are kept away from the queries: SQuat.

Paper: SQuat, arXiv:2503.24358; the maths and where it differs is `compress.cache.compensation`, storage that of
`compress.cache.kivi`. The second moment of the queries of each KV head comes from one of two places:

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
from compress.cache.compensation import corrections, quantize_groups, visiting_order
from compress.cache.queries import expect_queries
from compress.errors import CompressError


class Config(kivi.Config):
    block: int = Field(8, ge=1, description="channels rounded together before the rest is corrected")
    strength: float = Field(10.0, ge=0, description="weight of the queries' moment, relative to its mean diagonal; 0: KIVI")
    cap: float = Field(1.0, gt=0, description="largest entry of a correction matrix")


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
        self.watched = False  # an attention function will show the queries of every call
        self._moves: tuple[Tensor, list[Tensor]] | None = None

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        super().allocate(key_states, value_states)
        batch, heads, _, width = key_states.shape
        if width % self.config.block:
            raise CompressError(f"block {self.config.block} does not divide the head_dim of {width}")
        self._moves, self._frozen, self._awaiting = None, self.given is not None, False
        if self.given is None:
            self.metric = GrowingRows(batch, heads, width * width, torch.float32, key_states.device, 1)
            self.metric.append(torch.zeros(batch, heads, 1, width * width, device=key_states.device))
            self._buffers.append(self.metric)
        elif self.given.shape != (heads, width, width):
            raise CompressError(f"a metric of this model is [{heads}, {width}, {width}], got {list(self.given.shape)}")

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        if self._awaiting:  # the last call's queries never came
            self._awaiting = False
            self.flush()
        if self.watched and not self._frozen:
            self._awaiting = True
            expect_queries(self)
        super().append(key_states, value_states)

    def flush(self) -> None:
        if not self._awaiting:
            super().flush()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def see(self, query: Tensor, valid: Tensor | None) -> None:
        """Add the queries `[batch, heads, tokens, head_dim]` of the last call; `valid` `[batch, tokens]` is false for
        padding. Groups that waited for them are packed."""
        if not self._awaiting:
            return
        self._awaiting = False
        heads = self.exact_keys.data.shape[1]
        rows = query.detach().float().unflatten(1, (heads, -1))  # the query heads of a KV head follow each other
        if valid is not None and not valid.all():
            rows = rows * valid[:, None, None, :, None]
            self._hide_padding(valid)
        self.metric.rows()[:, :, 0] += torch.einsum("bhqtd,bhqte->bhde", rows, rows).flatten(-2)
        self.flush()

    def _hide_padding(self, valid: Tensor) -> None:
        """Nobody reads the keys of padding, but they widen the range of their group: they become the first real one."""
        keys = self.exact_keys.rows()[:, :, -valid.shape[1] :]
        first = valid.int().argmax(dim=1)[:, None, None, None].expand(*keys.shape[:2], 1, keys.shape[3])
        keys.copy_(torch.where(valid[:, None, :, None], keys, keys.gather(2, first)))

    def round_keys(self, keys_BHNGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order, moves = self._corrections()
        order = order.expand(*keys_BHNGD.shape[:2], -1)
        by_group = order[:, :, None, None].expand_as(keys_BHNGD)
        codes, scale, minimum = quantize_groups(
            keys_BHNGD.gather(-1, by_group), self.key_bits, self.key_affine.data.dtype, self.config.block, moves
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
            if not metric.any():
                warnings.warn(
                    "squat saw no queries and rounds keys as kivi does; give KVCache the model, not its config, or metrics",
                    stacklevel=2,
                )
            moves = corrections(metric, self.config.block, self.config.strength, self.config.cap)
            self._moves = visiting_order(metric), moves if self.config.strength else []
        return self._moves

    def _of_the_prompt(self) -> Tensor:
        """The collected moment `[batch, heads, head_dim, head_dim]`; it stays from now on, in fp16, mean diagonal 1."""
        metric = self.metric.rows().unflatten(-1, (self.head_dim, self.head_dim)).squeeze(2).float()
        if not self._frozen:
            self._frozen = True
            mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
            metric = metric / torch.where(mean > 0, mean, 1)
            self.metric.data = metric.flatten(-2).unsqueeze(2).half()
        return self.metric.rows().unflatten(-1, (self.head_dim, self.head_dim)).squeeze(2).float()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._moves = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._moves = None
