"""Orthonormal bases that spread or order the energy of activations: random, principal components, Hadamard.

ResQ (arXiv:2412.14363) takes principal components, sorted, with a random rotation inside the low and the high part;
QuaRot (arXiv:2404.00456) a Hadamard matrix with random signs. All fp64, all from a seeded generator on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.hadamard import hadamard


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed `[width, width]` fp64: QR of a normal matrix with the signs of R taken out."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def pca_basis(moment: Tensor, high: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal `[n, n]` fp64 whose last `high` columns span the directions of largest second moment.

    Within the low and the high part a random rotation spreads the energy evenly over the coordinates, so that one scale
    fits all of them; with no generator the columns stay eigenvectors.

    Raises:
        ValueError: the moment is not finite.
    """
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds NaN or infinite values")
    vectors = torch.linalg.eigh(moment.double().cpu()).eigenvectors  # ascending; on the CPU: the same on every device
    if generator is None:
        return vectors
    low = len(vectors) - high
    parts = [vectors[:, :low] @ random_orthogonal(low, generator)]
    if high:
        parts.append(vectors[:, low:] @ random_orthogonal(high, generator))
    return torch.cat(parts, dim=1)


def hadamard_basis(width: int, generator: torch.Generator | None = None) -> Tensor:
    """Orthonormal Hadamard matrix fp64, with random signs of its rows when there is a generator."""
    matrix = hadamard(torch.eye(width, dtype=torch.float64))
    if generator is None:
        return matrix
    return matrix * (2 * torch.randint(0, 2, (width, 1), generator=generator, dtype=torch.float64) - 1)
