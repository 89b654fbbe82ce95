"""Model Breadcrumbs: drop outliers and small entries of each task vector (arXiv 2312.06795).

Per tensor of n entries: the ⌊γ·n⌋ greatest magnitudes are dropped, and of the rest the smallest
until ⌊density·n⌋ are left (as in mergekit: fewer outliers where both cannot be had)::

    θ = θ0 + Σ c_i · m_i ⊙ τ_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.checkpoint import State, task_vector
from benchmark.contracts import Card, Knowledge, Setting
from benchmark.merging.tau import GridMerger, active, weighted_sum, wide
from benchmark.merging.ties import threshold


@dataclass(frozen=True)
class Breadcrumbs(GridMerger):
    """Mask both ends of every τ, then task arithmetic.

    Attributes:
        density: share of entries kept, in (0, 1].
        gamma: share of greatest entries dropped, in [0, 1).
    """

    density: float = 0.9
    gamma: float = 0.01

    card: ClassVar[Card] = Card(
        summary="Drops the greatest and the smallest entries of each task vector",
        paper="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        authors="MohammadReza Davari, Eugene Belilovsky",
        arxiv="2312.06795",
        fidelity="faithful",
        notes="masks per tensor, as mergekit; entries that tie with a threshold share its fate",
    )

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and 0 <= self.gamma < 1):
            raise ValueError("need 0 < density <= 1 and 0 <= gamma < 1")
        super().__post_init__()

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [
            {key: self._mask(delta) for key, delta in task_vector(expert, base).items()}
            for expert in experts
        ]
        return lambda setting: weighted_sum(
            base, [(c, taus[i]) for i, c in active(setting, len(taus))]
        )

    def _mask(self, tau: Tensor) -> Tensor:
        n = tau.numel()
        kept, top = int(self.density * n), int(self.gamma * n)
        if self.density >= 1:
            return tau
        if kept == 0:
            return torch.zeros_like(tau)
        top -= max(0, kept + top - n)
        size = wide(tau).abs()
        low = threshold([tau], kept + top)  # the (kept + top) greatest are at least this
        mask = size >= low
        if top:
            mask &= size < threshold([tau], top)
        return torch.where(mask, tau, 0)
