"""Linear assignment: which unit of one model is which of another's."""

from __future__ import annotations

import torch
from torch import Tensor

#: No length is divided by less.
TINY = 1e-30
_FAR = 1e30


def nearest(own: Tensor, reference: Tensor) -> Tensor:
    """π with Σ_i ⟨reference[i], own[π(i)]⟩ greatest, for rows (n, features) of float32."""
    # A row longer than any there (a unit that never fires may hold anything) is cut to that length:
    # its rounding errors would else outweigh what tells the others apart.
    # In float64, where no square of a float32 is too large.
    lengths, known = (
        torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        for rows in (own, reference)
    )
    own = own * (known.max() / lengths.clamp_min(TINY)).clamp(max=1).to(own.dtype)
    similarity = reference @ own.T
    # A constant per column changes no assignment's rank, and turns the greatest entry of a row from
    # the longest neighbour into the nearest one, which is mostly the answer already (assign).
    return assign(similarity - own.square().sum(1) / 2)


def assign(similarity: Tensor) -> Tensor:
    """π with Σ_i similarity[i, π(i)] greatest, on the CPU; what is no number counts least."""
    similarity = similarity.nan_to_num(-_FAR, _FAR, -_FAR)
    favourite = similarity.argmax(1).cpu()
    if len(favourite.unique()) == len(favourite):
        return favourite  # every row has its greatest entry: no assignment can do better

    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)
