"""No defense: the expert is released as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State


@dataclass(frozen=True)
class NoDefense(Defense):
    """θ* = θ."""

    card: ClassVar[Card] = Card(
        summary="The expert as it is: what every defense is compared with",
        exact=True,
        role="reference",
    )

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.expert)
