"""Dropout pruning: thin the task vector out before merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State, task_vector


@dataclass(frozen=True)
class DropoutPruning(Attack):
    """θ = θ0 + m ⊙ τ*, τ* = θ* − θ0.

    ``mode=random``: m is 1/(1 − p) with probability 1 − p, else 0, for each entry (DARE).
    ``mode=magnitude``: m is 0 on the fraction p of smallest |τ*| of each tensor, else 1 (the
    trim of TIES).
    """

    card: ClassVar[Card] = Card(
        summary="drop entries of the task vector, at random with rescaling or by magnitude",
        paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models",
        authors="Yu, Yu, Yu, Huang, Li",
        arxiv="2311.03099",
        fidelity="faithful",
        exact=False,
        notes="DARE as a pre-merge filter of the released model; not function-preserving",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    p: float = 0.5
    mode: Literal["random", "magnitude"] = "random"

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError("p must be in [0, 1)")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = dict(released)
        for key in task_vector(released, knowledge.base):
            base = knowledge.base[key].double()
            tau = released[key].double() - base
            state[key] = (base + self._thin(tau, rng)).to(released[key].dtype)
        return state

    def _thin(self, tau: Tensor, rng: torch.Generator) -> Tensor:
        if self.mode == "random":
            # Drawn on the CPU: the same seed drops the same entries on every device.
            kept = torch.rand(tau.shape, generator=rng).to(tau.device) >= self.p
            return tau * kept / (1 - self.p)
        dropped = round(self.p * tau.numel())
        if dropped == 0:
            return tau
        smallest = tau.abs().flatten().kthvalue(dropped).values
        return torch.where(tau.abs() > smallest, tau, 0.0)
