"""Passes over the original model, rotated or not, before a run starts: forwards for trials, back for what the output minds.

Which of them a run needs, and on how many tokens, is read off its rules: a search and `weighting: fisher` need gradients
of a few thousand tokens, `calibration.token_weighting` of all. Memory: one block, its activations, and the hidden states of
the tokens and their gradients; what the forward pass leaves for the way back lies on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from compress.calibrate.blocks import BlockRunner
from compress.calibrate.sensitivity import StoredStates, output_gradients
from compress.model import materialise, materialise_head, release
from compress.plan import HEAD, Job, minds
from compress.prepare import Prepared

STATES = "states"  # the folder, in a run's staging directory
BATCH_TOKENS = 1024  # the activations of a block and their gradients are held at once
_TOKENS = 16384  # enough to rank alternatives by; the real run takes all of them
_BACKWARD = 8192  # tokens for sensitivities: a mean of what a neuron's error does


class Passes:
    """Which passes a run needs, for the jobs that are open and `tokens` calibration tokens."""

    def __init__(self, prepared: Prepared, jobs: list[Job], tokens: int) -> None:
        self.share = prepared.recipe.calibration.token_weighting
        self.searched = any(minds(job, "allocation", "search") for job in jobs)
        # whose errors are priced by what they do to the output
        self.priced = {job.name for job in jobs if minds(job, "allocation", "search") or minds(job, "weighting", "fisher")}
        # whose gradients are looked at: every matrix is fitted to tokens that have weights
        self.watched = [j for j in prepared.plan.jobs if j.block != HEAD and (self.share or j.name in self.priced)]
        self.needed = bool(jobs or self.watched)
        # the way back ends there
        self.first_block = min((j.block for j in [*jobs, *self.watched] if j.block != HEAD), default=0)
        self.tokens = tokens if self.share else min(_TOKENS, tokens)
        self.backward_tokens = (self.tokens if self.share else min(_BACKWARD, self.tokens)) if self.watched else 0

    def batches(self, runner: BlockRunner) -> int | None:
        """How many batches go back; None for all."""
        return None if self.share else max(1, _BACKWARD // runner.batches[0][0].numel())


def forwards(prepared: Prepared, runner: BlockRunner) -> Iterator[tuple[int, None]]:
    """Each block in turn, with its weights and its inputs in `runner.hidden`."""
    for index in range(prepared.plan.num_blocks):
        prefix = f"{prepared.plan.blocks_name}.{index}."
        materialise(prepared.model, prepared.source, prefix, prepared.dtype, prepared.device)
        yield index, None
        runner.run(index, keep=True)
        release(prepared.model, prefix)


def backwards(prepared: Prepared, runner: BlockRunner, passes: Passes, folder: Path) -> Iterator[tuple[int, list[Tensor]]]:
    """Each block from the last to the first, with its weights, its inputs in `runner.hidden` and the gradients behind it;
    who takes them puts those before the block in their place."""
    states, model, plan = StoredStates(folder), prepared.model, prepared.plan
    for index, _ in forwards(prepared, runner):
        if index >= passes.first_block:
            states.put(index, runner.hidden)
    held = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.is_meta}
    materialise_head(model, prepared.source, plan.blocks_name, prepared.dtype, prepared.device)
    gradients = output_gradients(runner, passes.batches(runner))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta and name not in held:
            release(model, name)
    for index in reversed(range(passes.first_block, plan.num_blocks)):
        prefix = f"{plan.blocks_name}.{index}."
        materialise(model, prepared.source, prefix, prepared.dtype, prepared.device)
        runner.hidden = states.get(index)
        yield index, gradients
        release(model, prefix)
    shutil.rmtree(folder)
