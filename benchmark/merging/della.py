"""DELLA: drop entries with a probability that falls with their magnitude (arXiv 2406.11617).

Per row of each τ, ranks r from 0 (smallest) to 1 (greatest)::

    keep with p = density − ε + 2·ε·r,     kept entries / p

then TIES' election of a sign (``elect``) or a plain sum. mergekit draws the same mask and rescales
to the tensor's ℓ1 norm instead of by p: ``rescale=l1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State, task_vector
from benchmark.merging.dare import draws_of
from benchmark.merging.tau import GridMerger, active, weighted_sum
from benchmark.merging.ties import elected


@dataclass(frozen=True)
class Della(GridMerger):
    """Rank-wise dropping, then sign election.

    Attributes:
        density: mean share of entries kept, in (0, 1].
        epsilon: how far the probability of the greatest entries is above it, of the smallest below.
        elect: sum only members that agree with the elected sign; else all.
        rescale: ``inverse``: kept entries / p (the paper); ``l1``: to the norm before (mergekit).
    """

    density: float = 0.5
    epsilon: float = 0.15
    elect: bool = True
    rescale: Literal["inverse", "l1"] = "inverse"

    stochastic: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        summary="Drops entries at random, small ones more often, elects a sign",
        paper="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based "
        "Sampling",
        authors="Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
        arxiv="2406.11617",
        fidelity="faithful",
    )

    def __post_init__(self) -> None:
        within = self.density - self.epsilon > 0 and self.density + self.epsilon < 1
        if not (self.density == 1 or within):
            raise ValueError("need density ± epsilon within (0, 1)")
        super().__post_init__()

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        seed = int(torch.randint(2**62, (), generator=rng))
        taus = [self._drop(task_vector(expert, base), seed) for expert in experts]

        def merged(setting: Setting) -> State:
            kept = [(c, taus[i]) for i, c in active(setting, len(taus))]
            return elected(base, kept) if self.elect else weighted_sum(base, kept)

        return merged

    def _drop(self, tau: State, seed: int) -> State:
        if self.density == 1:
            return tau
        rng = draws_of(tau, seed)
        return {key: self._thin(tau[key], rng) for key in sorted(tau)}

    def _thin(self, tau: Tensor, rng: torch.Generator) -> Tensor:
        p = self.keep(tau)
        kept = tau * (torch.rand(tau.shape, generator=rng).to(tau.device) < p)
        if self.rescale == "inverse":
            return kept / p
        after = kept.abs().sum()
        return kept * (tau.abs().sum() / after) if after > 0 else kept

    def keep(self, tau: Tensor) -> Tensor:
        """The probability of keeping each entry, ranked within its row (a vector is one row)."""
        rows = tau.abs().reshape(-1, tau.shape[-1]) if tau.ndim > 1 else tau.abs().reshape(1, -1)
        ranks = rows.argsort(1).argsort(1).to(tau.dtype)
        ranks = ranks / max(rows.shape[1] - 1, 1)
        return (self.density - self.epsilon + 2 * self.epsilon * ranks).reshape(tau.shape)
