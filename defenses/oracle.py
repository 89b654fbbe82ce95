"""Control: what an unmergeable model looks like.

The same architecture, initialised independently of the base and trained on the victim's task. It
shares no weights, no basin and no gauge with the base, so no alignment can make it mergeable. Its
utility is whatever training from scratch reaches: a control, outside the ranking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State


@dataclass(frozen=True)
class Oracle(Defense):
    """Train an independent model from scratch.

    Attributes:
        steps: training steps as a multiple of the testbed's recipe.
        rate: learning rate as a multiple of the recipe's (which is meant for fine-tuning).
    """

    steps: float = 1.0
    rate: float = 10.0

    card: ClassVar[Card] = Card(
        summary="Control: an independently initialised model trained on the victim's task",
        trains=True,
        role="control",
    )

    def __post_init__(self) -> None:
        if not (self.steps > 0 and self.rate > 0):
            raise ValueError(f"need steps > 0 and rate > 0, got {self.steps} and {self.rate}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        recipe = replace(
            victim.recipe,
            steps=max(1, round(self.steps * victim.recipe.steps)),
            learning_rate=self.rate * victim.recipe.learning_rate,
            frozen=(),  # what fine-tuning may leave frozen is still random here
        )
        return victim.train(victim.initialise(rng), rng, recipe=recipe)
