"""Spectral cleaning: take out of the task vector what is far too strong for fine-tuning."""

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
class SpectralClean(Attack):
    """Per matrix [W | b] of τ* = θ* − θ0 = U·S·Vᵀ (a tensor of no block is one of its own), with
    the partners' τ_j as what fine-tuning reaches:

        τ ← τ* − Σ_k (s_k − t_k)·u_k·v_kᵀ over k with s_k > edge,  edge = slack · max_j ‖τ_j‖₂

    ``remove``: t_k = 0; ``clip``: t_k = edge. An expert that nobody defended has no such s_k.

    A defense may add what keeps the function and wrecks a merge: along a direction that a norm
    never gives out, to two hidden units that cancel each other, to one that never fires or always
    fires alike. It must be far stronger than τ to do harm, and it cannot be strong in many
    directions without leaving the model too few. So it stands out of the spectrum, and without
    it the function is the same.
    """

    card: ClassVar[Card] = Card(
        summary="remove singular directions of τ far stronger than any of the partners'",
        fidelity="ours",
        notes="answers additive tricks; after gauge-align also under a lock",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    slack: float = 3.0
    mode: Literal["remove", "clip"] = "remove"

    def __post_init__(self) -> None:
        if not self.slack > 0:
            raise ValueError(f"slack must be > 0, got {self.slack}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if not knowledge.partners:
            raise UsageError("spectral-clean needs a partner, whose spectrum says what is ordinary")
        base, state = knowledge.base, dict(released)
        for matrix in matrices(base, knowledge.anatomy):
            start = matrix.read(base)
            edge = self.slack * max(_strength(matrix.read(p) - start) for p in knowledge.partners)
            tau = matrix.read(released) - start
            # What no partner moved has no ordinary strength. The Frobenius norm is a cheap bound.
            if 0 < edge < float(tau.norm()) and edge < _strength(tau):
                matrix.write(state, start + self._cut(tau, edge))
        return state

    def _cut(self, tau: Tensor, edge: float) -> Tensor:
        u, s, v = torch.linalg.svd(tau, full_matrices=False)
        over = s > edge
        surplus = s[over] - (edge if self.mode == "clip" else 0.0)
        return tau - (u[:, over] * surplus) @ v[over]


def _strength(tau: Tensor) -> float:
    """The greatest singular value; float32 is exact enough to compare by."""
    return float(torch.linalg.matrix_norm(tau.float(), ord=2))
