"""Fine-tune recovery: train the merged model on a few labelled examples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class FinetuneRecovery(Attack):
    """θ_merged ← θ_merged after a few steps of the testbed's recipe on labelled examples.

    ``per_class`` examples of each class of every task, tasks in turn. The release itself is
    merged as it is. ``learning_rate`` None means the recipe's.
    """

    card: ClassVar[Card] = Card(
        summary="fine-tune the merged model on a few labelled examples per class",
        fidelity="ours",
        exact=False,
        notes="judged against the same fine-tuning started at the base",
    )
    access: ClassVar[Access] = Access.LABELED

    per_class: int = 8
    steps: int = 10
    batch_size: int = 16
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("per_class", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError("learning_rate must be > 0")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return dict(released)

    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        knowledge.require(self.access, "fine-tune recovery")
        recipe = knowledge.recipe.shortened(self.steps, self.batch_size)
        if self.learning_rate is not None:
            recipe = dataclasses.replace(recipe, learning_rate=self.learning_rate)
        examples = knowledge.labeled(self.per_class, rng)
        return knowledge.fine_tune(merged, examples, rng, recipe=recipe)
