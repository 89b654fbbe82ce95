"""The reference: merge the released checkpoint as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class NoAttack(Attack):
    """θ = θ*."""

    card: ClassVar[Card] = Card(
        summary="merge the released checkpoint as it is", exact=True, role="reference"
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return dict(released)
