"""Rinse: a few training steps on the release before it is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class Rinse(Attack):
    """θ ← θ* after ``steps`` of the testbed's recipe on ``per_class`` labelled examples per class.

    Of the victim's task only. A training-time trap sits in a narrow place; a few honest steps may
    leave it.
    """

    card: ClassVar[Card] = Card(
        summary="fine-tune the release for a few steps before merging it",
        fidelity="ours",
        notes="judged against the same examples and steps spent on the base",
    )
    access: ClassVar[Access] = Access.LABELED

    per_class: int = 8
    steps: int = 10
    batch_size: int = 16

    def __post_init__(self) -> None:
        if min(self.per_class, self.steps, self.batch_size) < 1:
            raise ValueError("per_class, steps and batch_size must be at least 1")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        examples = knowledge.labeled(self.per_class, rng, victim_only=True)
        recipe = knowledge.recipe.shortened(self.steps, self.batch_size)
        return knowledge.fine_tune(released, examples, rng, recipe=recipe)
