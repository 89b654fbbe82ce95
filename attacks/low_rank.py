"""Low rank: keep the strongest directions of the task vector, or only its signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State, task_vector


@dataclass(frozen=True)
class LowRank(Attack):
    """Per matrix of τ* = θ* − θ0 (vectors stay):

        ``svd``:   τ ← U_r S_r V_rᵀ, the best approximation of rank r = share · min(n, m)
        ``signs``: τ ← sign(τ*) · mean|τ*|, row by row

    Fine-tuning moves weights along few directions; noise and leftovers of a lock lie in all.
    """

    card: ClassVar[Card] = Card(
        summary="keep the top singular directions of each task matrix, or its signs",
        fidelity="ours",
        notes="truncation as in TSV (arXiv 2412.00081), signs as in 1-bit delta compression",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    share: float = 0.1
    mode: Literal["svd", "signs"] = "svd"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, state = knowledge.base, dict(released)
        for key, tau in task_vector(released, base).items():
            if tau.ndim > 1:
                flat = self._cut(tau.flatten(1)).reshape(tau.shape)
                state[key] = (base[key].double() + flat).to(tau.dtype)
        return state

    def _cut(self, tau: Tensor) -> Tensor:
        """(n, m) → (n, m) float64."""
        if self.mode == "signs":
            wide = tau.double()
            return wide.sign() * wide.abs().mean(1, keepdim=True)
        # float32 is as exact as the weights are, and halves the time of the decomposition.
        u, s, v = torch.linalg.svd(tau.float(), full_matrices=False)
        rank = max(1, round(self.share * len(s)))
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).double()
