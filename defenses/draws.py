"""Random matrices that several defenses draw: float64, from the CPU generator ``rng``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Independent entries, uniform on [0, 1)."""
    return torch.rand(shape, generator=rng, dtype=torch.float64)


def log_uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Independent entries whose logarithm is uniform on [log low, log high)."""
    start, stop = math.log(low), math.log(high)
    return torch.exp(start + (stop - start) * uniform(shape, rng))


def orthogonal(heads: int, size: int, rng: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrices: (heads, size, size)."""
    q, r = torch.linalg.qr(gaussian((heads, size, size), rng))
    # QR alone is biased; the signs of R's diagonal make the law uniform (Mezzadri 2007).
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
