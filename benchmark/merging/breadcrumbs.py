"""Model Breadcrumbs: drop outliers and small entries of each task vector (arXiv 2312.06795).

Per tensor of n entries: the ⌊γ·n⌋ greatest magnitudes are dropped, and of the rest the smallest
until ⌊density·n⌋ are left (as in mergekit: fewer outliers where both cannot be had)::

    θ = θ0 + Σ c_i · m_i ⊙ τ_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State
from benchmark.merging.selection import threshold
from benchmark.merging.streaming import Cut, Difference, differences
from benchmark.merging.tau import GridMerger, active, weighted_sum


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
            {key: self._mask(delta) for key, delta in differences(expert, base).items()}
            for expert in experts
        ]
        return lambda setting: weighted_sum(
            base, [(c, taus[i]) for i, c in active(setting, len(taus))]
        )

    def _mask(self, delta: Difference) -> Cut:
        n = len(delta)
        if self.density >= 1:
            return Cut(delta, 0.0)
        kept, top = int(self.density * n), int(self.gamma * n)
        if kept == 0:
            return Cut(delta, math.inf)
        top -= max(0, kept + top - n)
        least = float(threshold([delta], kept + top))  # the (kept + top) greatest are at least this
        return Cut(delta, least, float(threshold([delta], top)) if top else math.inf)
