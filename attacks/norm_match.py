"""Norm matching: bring an inflated task vector back to an ordinary length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.errors import UsageError
from benchmark.core.state import State, norm, task_vector


@dataclass(frozen=True)
class NormMatch(Attack):
    """Per tensor, with τ* = θ* − θ0 and the partners' τ_j as what an ordinary length is:

        τ ← τ*·min(1, slack · mean_j ‖τ_j‖ / ‖τ*‖)

    so that a tensor no farther from the base than ``slack`` times a partner's stays as it is.
    ``always`` drops the minimum: short task vectors are stretched too.
    """

    card: ClassVar[Card] = Card(
        summary="rescale each tensor of the task vector to the norm of the partners",
        fidelity="ours",
        notes="answers defenses that inflate norms; after gauge-align it answers leftovers",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    slack: float = 2.0
    always: bool = False

    def __post_init__(self) -> None:
        if not self.slack > 0:
            raise ValueError(f"slack must be > 0, got {self.slack}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if not knowledge.partners:
            raise UsageError("norm-match needs a partner, whose task vector says what is ordinary")
        base, state = knowledge.base, dict(released)
        partners = [task_vector(partner, base) for partner in knowledge.partners]
        for key, tau in task_vector(released, base).items():
            lengths = [norm({key: partner[key]}) for partner in partners if key in partner]
            if not lengths:
                continue  # nobody's expert moved it: no length to compare with
            factor = self.slack * sum(lengths) / len(lengths) / norm({key: tau})
            if factor < 1 or self.always:
                moved = base[key].double() + factor * tau.double()
                state[key] = moved.to(released[key].dtype)
        return state
