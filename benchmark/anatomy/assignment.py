"""Linear assignment: which unit of one model is which of another's."""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 1e30


def assign(similarity: Tensor) -> Tensor:
    """π with Σ_i similarity[i, π(i)] greatest, on the CPU; what is no number counts least."""
    similarity = similarity.nan_to_num(-_FAR, _FAR, -_FAR)
    favourite = similarity.argmax(1).cpu()
    if len(favourite.unique()) == len(favourite):
        return favourite  # every row has its greatest entry: no assignment can do better

    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)
