"""Subtracting a scaled copy: of the protected task vector, or of what looks like a perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from benchmark.anatomy.matrices import matrices
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class SubtractScaled(Attack):
    """With τ* = θ* − θ0, and c = ``scale``:

        ``task-vector``: τ ← τ* − c·τ*
        ``residual``:    τ ← τ* − c·ε,  ε = τ* − P·τ*, P·τ* the best approximation of each matrix
                         [W | b] of rank r = share · min(n, m)

    The owner of MergeGuard subtracted a masked, scaled copy of τ from τ. So does the first: in a
    merger that is linear it is the victim's coefficient times 1 − c, and c < 0 gives back what the
    owner took. The second subtracts an estimate of the perturbation instead: fine-tuning moves
    weights along few directions, a mask on single entries spreads over all.
    """

    card: ClassVar[Card] = Card(
        summary="subtract a scaled copy of τ, or of what a low rank of it leaves over",
        paper="MergeGuard",
        arxiv="2511.11851",
        fidelity="reconstruction",
        notes="the first adaptive attack that MergeGuard's authors name: subtract a scaled copy of "
        "the protected task vector. The scale is not published, nor whether anything is left out "
        "of the copy; the residual is our estimate of the perturbation (c = 1: low-rank)",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    scale: float = 0.5
    of: Literal["task-vector", "residual"] = "task-vector"
    share: float = 0.1

    def __post_init__(self) -> None:
        if not (-2 <= self.scale <= 2 and self.scale):
            raise ValueError(f"scale must be within [-2, 2] and not 0, got {self.scale}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, state = knowledge.base, dict(released)
        for matrix in matrices(base, knowledge.anatomy):
            start = matrix.read(base)
            taken = tau = matrix.read(released) - start
            if not tau.any():
                continue
            if self.of == "residual":
                u, s, v = torch.linalg.svd(tau, full_matrices=False)
                rank = max(1, round(self.share * len(s)))
                taken = (u[:, rank:] * s[rank:]) @ v[rank:]
            matrix.write(state, start + tau - self.scale * taken)
        return state
