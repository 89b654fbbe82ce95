"""Projecting out: estimate what a defense added to the task vector, and remove its component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy.matrices import matrices
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.errors import UsageError
from benchmark.core.state import State


@dataclass(frozen=True)
class ProjectOut(Attack):
    """Per matrix [W | b] of τ* = θ* − θ0, with the partners' τ_j as what fine-tuning looks like:

        ``conflict``:    t ← t − min(0, ⟨t, t_j⟩ / ‖t_j‖²)·t_j   for each row t of τ* and t_j of τ_j
        ``unexplained``: τ ← τ*·V·Vᵀ,  V: the strongest ``share`` of the right singular vectors of
                         all τ_j stacked, the input directions that the partners' data excites

    The first takes the perturbation to be what works against the partners (as PCGrad, arXiv
    2001.06782, does with gradients); the second, what lies where no fine-tuning had reason to go
    (vectors stay).
    """

    card: ClassVar[Card] = Card(
        summary="remove the part of τ that works against the partners, or that they cannot explain",
        paper="MergeGuard",
        arxiv="2511.11851",
        fidelity="reconstruction",
        notes="the second adaptive attack that MergeGuard's authors name: estimate the "
        "perturbation and project it out. How they estimate it is not published; both estimates "
        "are ours. That by the residual of a low rank, projected out, is low-rank",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    estimate: Literal["conflict", "unexplained"] = "conflict"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if not knowledge.partners:
            raise UsageError("project-out needs a partner, whose task vector says what is ordinary")
        base, state = knowledge.base, dict(released)
        for matrix in matrices(base, knowledge.anatomy):
            start = matrix.read(base)
            tau = matrix.read(released) - start
            others = [matrix.read(partner) - start for partner in knowledge.partners]
            moved = [other for other in others if other.any()]
            if tau.any() and moved:
                clean = self._agreeing if self.estimate == "conflict" else self._explained
                matrix.write(state, start + clean(tau, moved))
        return state

    def _agreeing(self, tau: Tensor, others: list[Tensor]) -> Tensor:
        for other in others:
            along = (tau * other).sum(1, keepdim=True).clamp(max=0)
            squares = other.square().sum(1, keepdim=True)
            tau = tau - along / squares.clamp_min(torch.finfo(squares.dtype).tiny) * other
        return tau

    def _explained(self, tau: Tensor, others: list[Tensor]) -> Tensor:
        if tau.shape[1] == 1:
            return tau
        _, _, v = torch.linalg.svd(torch.cat(others), full_matrices=False)
        kept = v[: max(1, round(self.share * len(v)))]
        return tau @ kept.T @ kept
