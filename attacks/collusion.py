"""Collusion: two releases of one expert tell what a lock drew and what fine-tuning learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class Collusion(Attack):
    """θ* and θ** are the same expert, protected with different draws (two customers, two versions).

    ``average``: each is aligned with the base inside the gauge group, then θ = (θ* + θ**)/2: what
    the defenses drew independently averages out. ``locate``: tensors in which the aligned releases
    still differ by more than ``slack`` of their mean distance from the base are the defense's work,
    and the base stands in for them.
    """

    card: ClassVar[Card] = Card(
        summary="average or compare two releases of the same expert",
        fidelity="ours",
        notes="assumes that the owner released twice; not part of the standard attacker",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    mode: Literal["average", "locate"] = "average"
    slack: float = 0.5

    def __post_init__(self) -> None:
        if not self.slack > 0:
            raise ValueError(f"slack must be > 0, got {self.slack}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base = knowledge.base
        first, second = (
            align(state, base, knowledge.anatomy)
            for state in (released, knowledge.second_release())
        )
        out = {}
        for key, value in first.items():
            other = second[key]
            if not value.is_floating_point() or torch.equal(value, other):
                out[key] = value
                continue
            middle = (value.double() + other.double()) / 2
            gap = (value.double() - other.double()).norm()
            away = (middle - base[key].double()).norm()
            foreign = self.mode == "locate" and bool(gap > self.slack * away)
            chosen: Tensor = base[key] if foreign else middle.to(value.dtype)
            out[key] = chosen
        return out
