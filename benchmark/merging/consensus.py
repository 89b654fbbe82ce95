"""Consensus merging: keep what several tasks use (Wang et al. 2024, arXiv 2405.07813).

With τ = Σ τ_i over the members, the entries that task i uses of τ are::

    m_i = 1[|τ_i| ≥ λ·|τ − τ_i|]                        TALL mask
    θ = θ0 + 1[Σ m_i ≥ k] ⊙ Σ c_i·τ_i                   consensus mask, k = 2

so what one task alone uses, or none, is dropped. The paper scales all tasks by one α; here each has
its coefficient, as in task arithmetic. Masks are those of the plain sum, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State, task_vector
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import GridMerger, active, searched

_USUAL = 0.4


@dataclass(frozen=True)
class Consensus(GridMerger):
    """Task arithmetic on the entries that at least ``k`` tasks use.

    Attributes:
        lam: λ; None: searched.
        lams: the values of λ that are tried.
        k: tasks that must use an entry; no more than there are members.
    """

    lam: float | None = None
    lams: tuple[float, ...] = searched((0.2, 0.4, 0.6))
    k: int = 2

    card: ClassVar[Card] = Card(
        summary="Keeps the entries of the summed task vectors that at least two tasks use",
        paper="Localizing Task Information for Improved Model Merging and Compression",
        authors="Ke Wang et al.",
        arxiv="2405.07813",
        fidelity="reconstruction",
        notes="a coefficient per member where the paper has one for all; one λ for all tasks, and "
        "its values are ours",
    )

    def __post_init__(self) -> None:
        tried = self.lams if self.lam is None else (self.lam,)
        if not tried or min(tried) < 0 or self.k < 1:
            raise ValueError("need lam >= 0, and k >= 1")
        super().__post_init__()

    def search_space(self, members: int) -> list[Setting]:
        """Every coefficient at each λ."""
        plain = super().search_space(members)
        if self.lam is not None:
            return plain
        return [
            Setting(s.coefficients, {**s.parameters, "lam": x}) for s in plain for x in self.lams
        ]

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """A setting without ``lam`` gets the field's, or ``_USUAL``."""
        taus = [task_vector(expert, base) for expert in experts]
        default = _USUAL if self.lam is None else self.lam

        def merged(setting: Setting) -> State:
            lam = float(setting.parameters.get("lam", default))
            members = active(setting, len(taus))
            weights = torch.tensor([c for _, c in members], dtype=torch.float64)
            out = dict(base)
            for key in moved(taus[i] for i, _ in members):
                zero = torch.zeros_like(base[key])
                deltas = torch.stack([wide(taus[i].get(key, zero)) for i, _ in members])
                uses = deltas.abs() >= lam * (deltas.sum(0) - deltas).abs()
                kept = uses.sum(0) >= min(self.k, len(members))
                step = torch.einsum("i...,i->...", deltas, weights.to(deltas))
                out[key] = (wide(base[key]) + kept * step).to(base[key].dtype)
            return out

        return merged
