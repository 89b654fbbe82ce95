"""DARE: drop entries of τ at random and rescale the rest (arXiv 2311.03099).

    τ̃_i = m_i ⊙ τ_i / density,   m_i ~ Bernoulli(density) per entry, so E[τ̃_i] = τ_i

``dare`` adds Σ λ_i·τ̃_i to the base. ``dare-ties`` elects a sign first and sums the members that
agree, without trimming by magnitude, as mergekit's method of that name does.

A member's mask depends on the seed and on its own τ alone, so that leaving another member out does
not change it (and equal members get equal masks).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State, digest, task_vector
from benchmark.merging.tau import GridMerger, active, weighted_sum
from benchmark.merging.ties import elected


@dataclass(frozen=True)
class _Dropped(GridMerger):
    """Drop and rescale once, then combine per setting.

    Attributes:
        density: share of entries kept, in (0, 1]; the paper's drop rate p is 1 − density.
    """

    density: float = 0.5

    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"need 0 < density <= 1, got {self.density}")
        super().__post_init__()

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        seed = int(torch.randint(2**62, (), generator=rng))
        taus = [drop(task_vector(expert, base), self.density, seed) for expert in experts]

        def merged(setting: Setting) -> State:
            kept = [(c, taus[i]) for i, c in active(setting, len(taus))]
            return self._combine(base, kept)

        return merged

    @abstractmethod
    def _combine(self, base: State, members: list[tuple[float, State]]) -> State:
        """The merged State of (coefficient, dropped τ) pairs."""


def draws_of(tau: State, seed: int) -> torch.Generator:
    """A generator that belongs to this τ: its masks depend on no other member, nor on the order."""
    own = hashlib.sha256(f"{seed}|{digest(tau)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(own[:8], "big") >> 1)


def drop(tau: State, density: float, seed: int) -> State:
    """τ̃: each entry kept with probability ``density`` and divided by it, else 0."""
    rng = draws_of(tau, seed)
    kept = {}
    for key in sorted(tau):
        mask = torch.rand(tau[key].shape, generator=rng) < density
        kept[key] = tau[key] * mask.to(tau[key].device) / density
    return kept


@dataclass(frozen=True)
class Dare(_Dropped):
    """Drop, rescale, task arithmetic."""

    card: ClassVar[Card] = Card(
        summary="Drops entries of each task vector at random, rescales, adds them to the base",
        paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
        "Free Lunch",
        authors="Le Yu et al.",
        arxiv="2311.03099",
        fidelity="faithful",
    )

    def _combine(self, base: State, members: list[tuple[float, State]]) -> State:
        return weighted_sum(base, members)


@dataclass(frozen=True)
class DareTies(_Dropped):
    """Drop, rescale, elect a sign, sum the members that agree."""

    card: ClassVar[Card] = Card(
        summary="Drops entries at random, rescales, then sums the members that agree in sign",
        paper="Language Models are Super Mario; TIES-Merging",
        authors="Le Yu et al.; Prateek Yadav et al.",
        arxiv="2311.03099, 2306.01708",
        fidelity="faithful",
        notes="as mergekit's dare_ties with normalize: false",
    )

    def _combine(self, base: State, members: list[tuple[float, State]]) -> State:
        return elected(base, members)
