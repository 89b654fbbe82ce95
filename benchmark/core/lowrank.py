"""Which part of a weight update is of low rank, and which is only rounding."""

from __future__ import annotations

import torch
from torch import Tensor

#: U (n, k), S (k), Vᵀ (k, m) with U·diag(S)·Vᵀ the matrix.
Factors = tuple[Tensor, Tensor, Tensor]


def rounding(*weights: Tensor) -> float:
    """What storing (n, m) weights in float32 (float64 where they are) adds to the singular values
    of a difference of two of them.

    Rounding errors are independent: a spectral norm of about ε/√12 · rms · (√n + √m); four times
    that. Of half precision no more is taken for rounding than of float32: a fine-tuning may hide
    in the rest.
    """
    worst = 0.0
    for weight in weights:
        flat = weight.detach().double()
        rms = float(flat.square().mean().sqrt())
        rows, columns = flat.shape
        eps = min(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        worst = max(worst, eps * rms * (rows**0.5 + columns**0.5))
    return worst


def thin_svd(matrix: Tensor, floor: float = 0.0) -> Factors:
    """The SVD of a matrix (n, m) in float64, without the singular values up to ``floor`` (or
    float64's own rounding): k is the numerical rank.
    """
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    own = float(s.max()) * max(matrix.shape) * torch.finfo(torch.float64).eps if len(s) else 0.0
    rank = int((s > max(floor, own)).sum())
    return u[:, :rank], s[:rank], v[:rank]
