"""Linear assignment: which unit of one model is which of another's."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(own: Tensor, reference: Tensor) -> Tensor:
    """π with Σ_i ⟨reference[i], own[π(i)]⟩ greatest, for rows (n, features) of float32."""
    similarity = reference @ own.T
    # A constant per column changes no assignment's rank, and turns the greatest entry of a row from
    # the longest neighbour into the nearest one, which is mostly the answer already (assign).
    return assign(similarity - own.square().sum(1) / 2)


def assign(similarity: Tensor) -> Tensor:
    """π with Σ_i similarity[i, π(i)] greatest, on the CPU."""
    favourite = similarity.argmax(1).cpu()
    if len(favourite.unique()) == len(favourite):
        return favourite  # every row has its greatest entry: no assignment can do better

    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)
