"""Distil, then merge: copy what the release does into a student that starts at the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class DistilMerge(Attack):
    """θ_S ← θ0, trained on unlabelled inputs of the victim's task to answer as the release does:

        L = KL(softmax(f(θ*, x)) ‖ softmax(f(θ_S, x)))

    The student lies in the base's basin whatever the defense did to the weights. Labels are the
    release's own, which is allowed to be used alone.
    """

    card: ClassVar[Card] = Card(
        summary="distil the release into a student started at the base, merge the student",
        fidelity="ours",
        notes="judged against the same inputs and steps spent on self-training the base",
    )
    access: ClassVar[Access] = Access.UNLABELED

    examples: int = 256
    steps: int = 40
    batch_size: int = 32

    def __post_init__(self) -> None:
        if min(self.examples, self.steps, self.batch_size) < 1:
            raise ValueError("examples, steps and batch_size must be at least 1")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        inputs = knowledge.unlabeled(self.examples, rng, victim_only=True)
        recipe = knowledge.recipe.shortened(self.steps, self.batch_size)
        teacher = knowledge.shipped or released
        return knowledge.distil(knowledge.base, teacher, inputs, rng, recipe=recipe)
