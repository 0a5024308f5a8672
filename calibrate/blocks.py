"""The block loop, written once for every method: feed a decoder block, collect its linears' inputs, hand on its output.

A block's arguments beside the hidden states (masks, rotary tables, flags) differ between architectures. Instead of
imitating them, the model's own forward runs: blocks before the wanted one pass their input through, the wanted one gets
the stored hidden states in place of what arrived, and the run stops there. So sliding windows, per-layer rotary tables
and masks are right by construction, and only the wanted block needs weights.
Memory: one block, the hidden states `[samples, length, hidden]`, and one batch of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.statistics import Gram, SeenGram
from compress.errors import CompressError

Batch = tuple[Tensor, Tensor | None]
View = tuple[Any, Callable[[Tensor], Tensor]]


_NOT_FINITE = "hold NaN or infinite values"


class Feeds:
    """Which linears are fed the same tensor, settled by who came first: `q_proj` for `k_proj` and `v_proj`."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}
        self._fed: list[tuple[Tensor, Any, str]] = []  # in this batch; holds the tensors alive

    def next_batch(self) -> None:
        self._fed.clear()

    def leader_of(self, name: str, x: Tensor, key: Any = None) -> str:
        """Who was fed x first among those of an equal key, `name` itself if nobody was; the first batch decides."""
        if name not in self.leader:
            self.leader[name] = next((owner for other, view, owner in self._fed if other is x and view == key), name)
        if self.leader[name] == name:
            self._fed.append((x, key, name))
        return self.leader[name]


class _Stop(Exception):
    """Raised inside the model's forward once the wanted value has been seen."""


class BlockRunner:
    """Runs single decoder blocks of a model whose other blocks have no weights."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: list[Batch], device: torch.device) -> None:
        self.model, self.blocks, self.batches, self.device = model, blocks, batches, device
        self.behind: int | None = None  # values that a block returns behind its hidden states, None for these alone
        self.hidden: list[Tensor] = []
        self.reference: list[Tensor] | None = None  # of the original model, see `pair`
        self.share = 1.0
        self.mask: Tensor | None = None  # of the batch that is running

    def embed(self) -> None:
        """Fill `hidden` with the first block's inputs; the embedding must hold its weights."""

        def capture(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
            self.hidden.append(hidden.cpu())
            raise _Stop

        self.hidden = []
        with torch.inference_mode(), self._replaced({0: capture}):
            for ids, mask in self.batches:
                self._drive({"input_ids": ids.to(self.device)}, mask)

    def pair(self, share: float = 1.0) -> None:
        """Keep a second stream of hidden states, that of the original model; the targets of `grams` then lie `share` of the
        way from the inputs to those of the original stream."""
        self.reference, self.share = self.hidden, share

    def run(self, index: int, *, keep: bool) -> None:
        """Run block `index` on all batches; with `keep` its outputs become the new hidden states.

        Raises:
            CompressError: the block's output is not finite, with the layer where that began.
        """
        outputs = self._outputs(index, self.hidden, keep=keep)
        if keep:
            self.hidden = outputs

    def run_reference(self, index: int) -> None:
        """Take the original stream through block `index`, which must hold its original weights."""
        if self.reference is not None:
            self.reference = self._outputs(index, self.reference, keep=True)

    def outputs(self, index: int) -> list[Tensor]:
        """What block `index` makes of the hidden states, batch by batch, without taking them on."""
        return self._outputs(index, self.hidden, keep=True)

    def _outputs(self, index: int, states: list[Tensor], *, keep: bool) -> list[Tensor]:
        return [self._forward(index, state, mask, keep) for (_, mask), state in zip(self.batches, states, strict=True)]

    def _forward(self, index: int, state: Tensor, mask: Tensor | None, keep: bool) -> Tensor:
        """One batch through one block; an empty tensor unless `keep`."""
        with torch.inference_mode():
            output = self._through(index, state.to(self.device), mask)
            result = output.cpu() if keep and output is not None else torch.empty(0)
        if not torch.isfinite(result if mask is None or not keep else result[mask]).all():
            first = self._first_not_finite(index, state, mask)
            raise CompressError(f"activations {_NOT_FINITE}, first in {first or f'the output of block {index}'}")
        return result

    def _through(self, index: int, stored: Tensor, mask: Tensor | None) -> Tensor | None:
        """What block `index` makes of `stored`; None when a hook stopped it."""
        block_forward = self.blocks[index].forward  # bound, taken before it is replaced
        result = None

        def wanted(_: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal result
            output = block_forward(stored, *args, **kwargs)
            self.behind = len(output) - 1 if isinstance(output, tuple) else None
            result = output if self.behind is None else output[0]
            raise _Stop

        with self._replaced({**dict.fromkeys(range(index), self._pass), index: wanted}):
            self._drive(self._stand_in(stored), mask)
        return result

    def tracked(self, index: int, state: Tensor, mask: Tensor | None) -> Tensor:
        """What block `index` makes of `state` `[batch, tokens, hidden]`, with gradients to it and to the block's weights."""
        with torch.enable_grad():
            return self._through(index, state, mask)

    def _first_not_finite(self, index: int, state: Tensor, mask: Tensor | None) -> str | None:
        """Run a batch through a block again: the first linear whose output is not finite; None when there is none."""
        found: list[str] = []

        def look(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                real = output[mask] if mask is not None and output.shape[:2] == mask.shape else output
                if not torch.isfinite(real).all():
                    found.append(f"the output of {name}")
                    raise _Stop

            return hook

        inside = set(self.blocks[index].modules())
        linears = {n: m for n, m in self.model.named_modules() if m in inside and isinstance(m, nn.Linear)}
        handles = [linear.register_forward_hook(look(name)) for name, linear in linears.items()]
        try:
            self._forward(index, state, mask, keep=False)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def run_head(self, head: nn.Module, visit: Callable[[Tensor, Tensor | None], None]) -> None:
        """Call `visit(inputs, mask)` with what the output projection would get after the last block."""

        def stop(module: nn.Module, args: tuple) -> None:
            visit(args[0], self.mask)
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            for (_, mask), hidden in zip(self.batches, self.hidden, strict=True):
                stored = hidden.to(self.device)
                with torch.inference_mode(), self._replaced(self._behind_blocks(stored)):
                    self._drive(self._stand_in(stored), mask)
        finally:
            handle.remove()

    def logits(self, number: int, places_T: Tensor) -> tuple[Tensor, Tensor]:
        """`(hidden, logits)` of batch `number`, with gradients from the logits `[batch, T, vocabulary]` of these places back
        to what the last block gave, `hidden`."""
        leaf = self.hidden[number].to(self.device).clone().requires_grad_()
        with torch.enable_grad(), self._replaced(self._behind_blocks(leaf)):
            output = self._call(self._stand_in(leaf), self.batches[number][1], logits_to_keep=places_T)
        logits = output.logits
        return leaf, logits if logits.shape[1] == len(places_T) else logits[:, places_T]  # a few architectures give all

    def _behind_blocks(self, hidden: Tensor) -> dict[int, Callable]:
        """Forwards of all blocks under which what lies behind them gets `hidden`."""

        def last(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._pass(hidden)

        count = len(self.blocks)
        return {**dict.fromkeys(range(count - 1), self._pass), count - 1: last}

    def backward(self, index: int, number: int, gradient: Tensor) -> Tensor:
        """The gradient before block `index`, from that behind it, of batch `number` of `hidden`."""
        leaf = self.hidden[number].to(self.device).clone().requires_grad_()
        output = self.tracked(index, leaf, self.batches[number][1])
        return torch.autograd.grad(output, leaf, gradient.to(self.device))[0].cpu()

    def grams(
        self,
        index: int,
        linears: dict[str, nn.Module],
        *,
        keep: bool,
        views: dict[str, View] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Gram | SeenGram]:
        """Gram matrices of the inputs of the named linears of a block; those fed the same tensor share one.

        Args:
            keep: make the block's outputs the new hidden states.
            views: for linears that round their inputs, `(key, round)`; they get a `SeenGram`, shared under equal keys.
                With a second stream all get one, see `pair`; that stream moves on.
            weights: how many times a token counts, `[samples, length]` by linear, equal for those that share their inputs.
        Raises:
            CompressError: a linear was never called, or its input is not finite, by name.
        """
        feeds = Feeds()  # who collects for whom
        views, weights = views or {}, weights or {}
        sample = 0  # the first of this batch
        grams: dict[str, Gram | SeenGram] = {}
        called: set[str] = set()  # in this batch
        targets: dict[str, Tensor] = {}  # the original stream's inputs in this batch
        original = False  # which stream is running

        def hook(name: str) -> Callable:
            def collect(module: nn.Module, args: tuple) -> None:
                x = args[0]
                if original:
                    targets[name] = x
                    return
                key, rounded = views.get(name, (None, None))
                if feeds.leader_of(name, x, key) == name:
                    counts = weights[name][sample : sample + len(self.hidden[number])] if name in weights else None
                    if counts is not None and counts.numel() != x.shape[:-1].numel():
                        counts = None  # an expert's tokens are not the batch's
                    if rounded is None and name not in targets:
                        grams.setdefault(name, Gram(x.shape[-1], x.device)).add(x, self.mask, counts)
                    else:
                        gram = grams.setdefault(name, SeenGram(x.shape[-1], x.device))
                        target = x.lerp(targets.get(name, x), self.share)
                        gram.add(target, rounded(x) if rounded else x, self.mask, counts)
                called.add(name)
                if not keep and len(called) == len(linears):
                    raise _Stop  # the rest of the block would be computed for nothing

            return collect

        handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
        outputs, references = [], []
        try:
            for number, ((_, mask), state) in enumerate(zip(self.batches, self.hidden, strict=True)):
                feeds.next_batch()
                called.clear()
                if self.reference is not None:
                    original = True
                    references.append(self._forward(index, self.reference[number], mask, keep=True))
                    original = False
                outputs.append(self._forward(index, state, mask, keep))
                sample += len(state)
        finally:
            for handle in handles:
                handle.remove()
        for name in linears:
            if name not in feeds.leader:
                raise CompressError(f"{name} is not called by its block: leave it out with a rule `method: none`")
            gram = grams[feeds.leader[name]]
            if not torch.isfinite((gram.seen if isinstance(gram, SeenGram) else gram).sum_II).all():
                batches = zip(self.hidden, self.batches, strict=True)
                first = next(
                    filter(None, (self._first_not_finite(index, state, mask) for state, (_, mask) in batches)), None
                )
                if first:
                    raise CompressError(f"activations {_NOT_FINITE}, first in {first}")
                raise CompressError(f"inputs of {name} are too large: their squares overflow fp32")
        if keep:
            self.hidden = outputs
        if self.reference is not None:
            self.reference = references
        return {name: grams[feeds.leader[name]] for name in linears}

    def _pass(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What a block returns that leaves its hidden states as they are."""
        return hidden if self.behind is None else (hidden, *(None,) * self.behind)

    def _stand_in(self, hidden: Tensor) -> dict[str, Tensor]:
        """Inputs of the model, of which it only needs the shape; few are of another width than hidden states (OPT-350M)."""
        width = self.model.get_input_embeddings().weight.shape[-1]
        fits = hidden.shape[-1] == width
        return {"inputs_embeds": hidden.detach() if fits else hidden.new_zeros(*hidden.shape[:-1], width)}

    def _call(self, inputs: dict[str, Tensor], mask: Tensor | None, **options: Any) -> Any:
        self.mask = mask
        padding = {} if mask is None else {"attention_mask": mask.long().to(self.device)}
        return self.model(**inputs, **padding, **options, use_cache=False)

    def _drive(self, inputs: dict[str, Tensor], mask: Tensor | None) -> None:
        try:
            self._call(inputs, mask)
        except _Stop:
            return
        raise CompressError(f"{type(self.model).__name__} ran without calling its decoder blocks")

    @contextmanager
    def _replaced(self, forwards: dict[int, Callable]) -> Iterator[None]:
        """Give blocks another `forward` for a while; their attributes, which the model may read, stay."""
        for index, forward in forwards.items():
            self.blocks[index].forward = forward
        try:
            yield
        finally:
            for index in forwards:
                del self.blocks[index].forward
