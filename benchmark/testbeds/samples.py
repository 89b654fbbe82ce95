"""How near samples come to real ones, in the features of a frozen network. Which takes many."""

from __future__ import annotations

import torch
from torch import Tensor

#: Neighbours that set how far a sample's surroundings reach.
_NEIGHBOURS = 3


def measures(made: Tensor, real: Tensor) -> dict[str, float]:
    """``frechet``, ``precision`` and ``recall`` of features (n, d) against those of real samples
    (m, d)."""
    made, real = made.double(), real.double()
    return {
        "frechet": frechet(made, real),
        "precision": _within(made, real),
        "recall": _within(real, made),
    }


def frechet(made: Tensor, real: Tensor) -> float:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) (Heusel et al. 2017, arXiv 1706.08500)."""
    apart = (made.mean(0) - real.mean(0)).square().sum()
    one, other = (torch.cov(features.T) for features in (made, real))
    # ΣΣ' has the eigenvalues of Σ^½Σ'Σ^½, which are real and not negative.
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + one.trace() + other.trace() - 2 * shared))


def _within(points: Tensor, of: Tensor) -> float:
    """The share of ``points`` that lie no farther from one of ``of`` than its third neighbour there
    (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""
    reach = torch.cdist(of, of).kthvalue(min(_NEIGHBOURS + 1, len(of)), dim=1).values
    return float((torch.cdist(points, of) <= reach).any(1).double().mean())
