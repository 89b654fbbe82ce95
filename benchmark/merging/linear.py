"""Average and task arithmetic: linear in the task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State
from benchmark.merging.streaming import differences
from benchmark.merging.tau import GridMerger, UnweightedMerger, active, weighted_sum


@dataclass(frozen=True)
class Average(UnweightedMerger):
    """θ0 + 1/m · Σ τ_i over the m members whose coefficient is not 0: the mean of their weights."""

    card: ClassVar[Card] = Card(
        summary="The mean of the members' weights",
        paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy "
        "without increasing inference time",
        authors="Mitchell Wortsman et al.",
        arxiv="2203.05482",
        fidelity="faithful",
    )

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [differences(expert, base) for expert in experts]

        def merged(setting: Setting) -> State:
            kept = active(setting, len(taus))
            return weighted_sum(base, [(1 / len(kept), taus[i]) for i, _ in kept])

        return merged


@dataclass(frozen=True)
class TaskArithmetic(GridMerger):
    """θ0 + Σ λ_i · τ_i."""

    card: ClassVar[Card] = Card(
        summary="Adds the scaled task vectors to the base",
        paper="Editing Models with Task Arithmetic",
        authors="Gabriel Ilharco et al.",
        arxiv="2212.04089",
        fidelity="faithful",
    )

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [differences(expert, base) for expert in experts]

        def merged(setting: Setting) -> State:
            return weighted_sum(base, [(c, taus[i]) for i, c in active(setting, len(taus))])

        return merged
