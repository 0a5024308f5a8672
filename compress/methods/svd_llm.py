"""SVD-LLM: truncated SVD of the whitened weight. The low-rank rival of CoSpaDi at equal bytes.

Paper: SVD-LLM, arXiv:2403.07378; eigh instead of Cholesky as in SVD-LLM V2, arXiv:2503.12340.

With G = L^T L the Gram matrix of the inputs, ||X (W - What)||_F = ||L (W - What)||_F, so the best rank-r What is
L^{-1} times the truncated SVD of L W. Where we differ: damping relative to the mean diagonal, fp64 throughout, the
singular values split evenly between the factors, and a rank that counts the bytes of both.
Left out: the sequential LoRA update of the paper. Cost: one I x I eigh and one SVD per matrix.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.layers import Spec
from compress.linalg import SecondMoment
from compress.methods import Site, bf16
from compress.methods._budget import BudgetConfig


class Config(BudgetConfig):
    rank_multiple: int = Field(1, ge=1, description="the rank is rounded down to a multiple of this; GPUs like 8")
    damping: float = Field(1e-6, ge=0, description="added to the Gram matrix, relative to its mean diagonal")


def alternatives(site: Site, config: Config) -> list[Config]:
    """What to try for a matrix when the budget is to be spread by search."""
    return [config.model_copy(update={"ratio": ratio}) for ratio in config.ratios()]


def plan(site: Site, config: Config) -> Spec:
    """Largest rank whose two factors take at most (1 - ratio) of the dense bytes."""
    in_features, out_features = site.in_features, site.out_features
    rank = int((1 - config.ratio) * in_features * out_features / (in_features + out_features))
    multiple = config.rank_multiple if rank >= 8 * config.rank_multiple else 1
    rank = rank // multiple * multiple
    if rank < 1:
        raise ValueError(f"ratio {config.ratio} leaves no rank for {in_features} x {out_features}")
    return {"format": "low_rank", "rank": rank}


def compress(weight_NI: Tensor, inputs: SecondMoment, spec: Spec, config: Config) -> dict[str, Tensor]:
    """Factors of the weight; see `compress.methods`."""
    whiten, unwhiten = inputs.whitening(config.damping)
    left, values, right = torch.linalg.svd(whiten @ weight_NI.double().T, full_matrices=False)
    root = values[: spec["rank"]].sqrt()
    down_IR = unwhiten @ (left[:, : spec["rank"]] * root)
    up_RN = root[:, None] * right[: spec["rank"]]
    return {"down": bf16(down_IR.T), "up": bf16(up_RN.T)}


def flops(in_features: int, out_features: int, spec: Spec, config: Config) -> float:
    """About 25 n^3 each for the eigendecomposition and the SVD, with what LAPACK loses against a matrix product."""
    small = min(in_features, out_features)
    return 25 * in_features**3 + 25 * small**2 * max(in_features, out_features)
