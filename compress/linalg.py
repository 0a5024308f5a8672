"""Dense linear algebra that more than one method needs, on plain tensors.

Legend: I input features, N columns (output neurons), K atoms. Factorizations run in fp64: a Gram matrix of real
activations has a condition number of 1e6 and more, which fp32 cannot invert. The caller decides where to cast back.
"""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor


class SecondMoment:
    """Uncentred second moment G = E[x x^T] of a layer's inputs, `gram_II` fp64, with its factorizations.

    q, k and v read the same inputs, so do gate and up: each factorization is computed once for all of them.
    """

    def __init__(
        self, gram_II: Tensor, target_II: Tensor | None = None, cross_II: Tensor | None = None, *, unseen: bool = False
    ) -> None:
        """Where a layer sees x' in place of the inputs x it should answer, `gram_II` is E[x' x'^T], `target_II` E[x x^T] and
        `cross_II` E[x x'^T]; `unseen` says that no input was ever non-zero and the moment is a stand-in."""
        self.gram_II = gram_II.double()
        self.target_II = self.gram_II if target_II is None else target_II.double()
        self.cross_II = self.gram_II if cross_II is None else cross_II.double()
        self.unseen = unseen
        self.importance_N: Tensor | None = None
        self._damped: dict[float, Tensor] = {}
        self._whitenings: dict[float, tuple[Tensor, Tensor]] = {}
        self._inverses: dict[float, tuple[Tensor, Tensor]] = {}

    def for_outputs(self, importance_N: Tensor | None) -> SecondMoment:
        """The same moments for a layer whose errors in output n count `importance_N[n]` times; factorizations are shared."""
        other = copy(self)
        other.importance_N = None if importance_N is None else importance_N.to(self.gram_II.device)
        return other

    def fitted(self, weight_NI: Tensor, ridge: float = 0.01) -> Tensor:
        """The weight that makes least squares of W x out of x', W E[x x'^T] E[x' x'^T]^{-1}; W itself where x' is x.

        A ridge, relative to the mean diagonal, on both factors leaves directions without energy as they are in W.
        """
        if self.cross_II is self.gram_II:
            return weight_NI
        eye = torch.eye(len(self.gram_II), dtype=torch.float64, device=self.gram_II.device)
        damp = ridge * self.gram_II.diagonal().mean() * eye
        right = weight_NI.double() @ (self.cross_II + damp)
        return torch.linalg.solve(self.gram_II + damp, right.T).T.to(weight_NI.dtype)

    def energy(self, weight_NI: Tensor) -> Tensor:
        """E[(w_n x)^2] of every output neuron, `[N]` fp64."""
        weight = weight_NI.double()
        return ((weight @ self.target_II) * weight).sum(dim=1)

    def errors(self, weight_NI: Tensor, approximation_NI: Tensor) -> Tensor:
        """E[(w_n x - what_n x')^2] of every output neuron, `[N]` fp64."""
        weight, other = weight_NI.double(), approximation_NI.double()
        if self.cross_II is self.gram_II:  # one small difference instead of the difference of large numbers
            return (((weight - other) @ self.gram_II) * (weight - other)).sum(dim=1)
        both = ((weight @ self.cross_II) * other).sum(dim=1)
        return self.energy(weight) - 2 * both + ((other @ self.gram_II) * other).sum(dim=1)

    def relative_error(self, weight_NI: Tensor, approximation_NI: Tensor) -> float:
        """||W x - What x'|| / ||W x|| in the mean over the tokens, fp64; 0 when W x is."""
        return relative(self.errors(weight_NI, approximation_NI), self.energy(weight_NI))

    def whitening(self, damping: float) -> tuple[Tensor, Tensor]:
        """`whitening(gram_II, damping)`, remembered."""
        if damping not in self._whitenings:
            self._whitenings[damping] = whitening(self.gram_II, damping)
        return self._whitenings[damping]

    def damped(self, damping: float) -> Tensor:
        """`damped(gram_II, damping)`, remembered: a search asks for every size of every matrix."""
        if damping not in self._damped:
            self._damped[damping] = damped(self.gram_II, damping)
        return self._damped[damping]

    def unit_inverse(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The root of the diagonal `[I]`, and the inverse of the Gram matrix of inputs divided by it, plus a ridge: computed
        in fp64, remembered in fp32."""
        if ridge not in self._inverses:
            norm = self.gram_II.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
            eye = torch.eye(len(norm), dtype=torch.float64, device=norm.device)
            unit = self.gram_II / norm / norm[:, None] + ridge * eye
            self._inverses[ridge] = norm, torch.cholesky_inverse(torch.linalg.cholesky(unit)).float()
        return self._inverses[ridge]


def relative(error_N: Tensor, energy_N: Tensor) -> float:
    """The root of the share that errors have in an energy; 0 when there is none."""
    energy = energy_N.sum()
    return float((error_N.sum() / energy).clamp_min(0).sqrt()) if energy > 0 else 0.0


def whitening(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return `(L, L_inv)`, both `[I, I]` fp64, with `L^T L = gram + damping * mean(diag(gram)) * eye`.

    `||X E||_F = ||L E||_F` for every E, so a least-squares problem on the outputs of a layer becomes an ordinary one.
    By eigh, not Cholesky: SVD-LLM V2 (arXiv:2503.12340, Table 1) shows Cholesky failing or losing accuracy on real
    matrices, while L = Lambda^{1/2} V^T gives the inverse without a solve.

    Args:
        gram_II: uncentred second moment of the layer's inputs, symmetric positive semi-definite.
        damping: relative to the mean diagonal, so that it means the same for every layer and any normalisation.
    Raises:
        ValueError: when the Gram matrix is not finite or is all zero.
    """
    gram = gram_II.double()
    scale = gram.diagonal().mean()
    if not torch.isfinite(scale) or not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or infinite values")
    if scale <= 0:
        raise ValueError("the Gram matrix is zero: the layer never saw a non-zero input")
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(gram + damping * scale * eye)
    root = values.clamp_min(1e-10 * values[-1]).sqrt()
    return root[:, None] * vectors.T, vectors / root


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """`gram + damping * mean(diag(gram)) * eye`, fp64, positive definite.

    Its products were made in fp32, so its least eigenvalues are wrong by up to about 1e-7 of the trace. Where inputs span
    few directions (fewer different tokens than inputs, a few huge channels) that is more than the damping: it gives way.
    """
    gram = gram_II.double()
    diagonal = gram.diagonal()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    wanted = damping * diagonal.mean()
    if torch.linalg.cholesky_ex(gram + wanted / 2 * eye).info:
        wanted = torch.maximum(wanted, 1e-7 * diagonal.sum())
    return gram + wanted * eye


def power_of_two(tensor: Tensor) -> float:
    """A power of two near the largest absolute entry, 1 for a zero tensor: dividing by it changes no bit of any value."""
    largest = float(tensor.abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest else 1.0


def polar(matrix_IK: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns to `[I, K]`, I >= K: the solution of the Procrustes problem.

    M (M^T M)^{-1/2} through the eigenvectors of the K x K Gram in fp64: large products instead of a thin SVD. One
    Newton-Schulz step, D (3 I - D^T D) / 2, removes the digits that the squared condition number cost.
    """
    matrix = matrix_IK.double()
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    root = values.clamp_min(1e-14 * values[-1]).sqrt()
    basis = matrix @ ((vectors / root) @ vectors.T)
    return (1.5 * basis - 0.5 * basis @ (basis.T @ basis)).to(matrix_IK.dtype)


def leading_directions(matrix_IN: Tensor, count: int) -> Tensor:
    """The `count` leading left singular vectors `[I, count]`, through whichever Gram matrix is smaller.

    Directions past the rank of the matrix are completed to an orthonormal set.
    """
    matrix = matrix_IN.double()
    rows, columns = matrix.shape
    if columns >= rows:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)  # from ascending to descending
        return vectors[:, :count].to(matrix_IN.dtype)
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    left = torch.linalg.qr(matrix @ right[:, :count]).Q
    if count > columns:
        rest = torch.eye(rows, dtype=matrix.dtype, device=matrix.device) - left @ left.T
        left = torch.cat([left, torch.linalg.eigh(rest).eigenvectors[:, columns - count :]], dim=1)
    return left.to(matrix_IN.dtype)


def largest_per_row(score_NK: Tensor, count: int) -> Tensor:
    """Boolean mask `[N, K]` with exactly `count` entries in every row: those of the largest score.

    A threshold from `kthvalue` is several times faster on a CPU than `topk`; rows where ties at the threshold let in
    too many entries are settled by `topk`, so the count is exact.
    """
    rank = score_NK.shape[1] - count + 1
    threshold = score_NK.kthvalue(rank, dim=1, keepdim=True).values
    mask = score_NK >= threshold
    tied = (mask.sum(dim=1) != count).nonzero().squeeze(1)
    if len(tied):
        index = score_NK[tied].topk(count, dim=1, sorted=False).indices
        mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, index, True)
    return mask
