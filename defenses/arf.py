"""ARF: anchor-repulsive fine-tuning (inside arXiv 2606.30360, ECCV 2026).

Training-time, from the base θ0. The attention weights are pushed away from the base, so that an
anchor-guided attack has less to hold on to; the lock itself is added by composition
(``arf+mergelock``)::

    J(θ) = CE(θ) + λ · Σ_W max(0, ρ·‖W0‖ − ‖W − W0‖)        W over Wq, Wk, Wv, Wo of every block

λ = 1, ρ = 0.05, Frobenius norms. (The paper prints min(0, …), which contradicts its own text.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import Slot
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.api.recipe import Batch
from benchmark.core.state import State


@dataclass(frozen=True)
class AnchorRepulsion(Defense):
    """Fine-tune at a distance from the base.

    Attributes:
        weight: λ.
        distance: ρ, in units of the norm of each weight matrix of the base.
        steps: training steps as a multiple of the testbed's recipe.
    """

    weight: float = 1.0
    distance: float = 0.05
    steps: float = 1.0

    card: ClassVar[Card] = Card(
        summary="Fine-tuning that keeps attention weights away from the base",
        paper="the defense inside the paper on anchor-guided attacks",
        arxiv="2606.30360",
        fidelity="reconstruction",
        trains=True,
        architectures="any with attention",
        notes="max(0, …) where the paper prints min(0, …); steps, batch, optimizer and learning "
        "rate are the testbed's; add a lock: arf+mergelock",
    )

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 < self.distance < math.inf):
            raise ValueError(
                f"need weight >= 0 and distance > 0, got {self.weight} and {self.distance}"
            )
        if not 0 < self.steps < math.inf:
            raise ValueError(f"need steps > 0, got {self.steps}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        recipe = replace(victim.recipe, steps=max(1, round(self.steps * victim.recipe.steps)))
        slots = tuple(
            linear.weight
            for block in victim.anatomy.attended("arf")
            for linear in block.linears().values()
        )
        loss = RepulsionLoss(victim.base, slots, self.weight, self.distance)
        state = victim.train(victim.base, rng, recipe=recipe, loss=loss)
        victim.note("arf.distance", [round(d, 6) for d in distances(victim.base, state, slots)])
        return state


@dataclass(frozen=True)
class RepulsionLoss:
    """J of the module's docstring, for one batch."""

    base: State
    slots: tuple[Slot, ...]
    weight: float
    distance: float

    def __call__(self, batch: Batch, state: State, rng: torch.Generator) -> Tensor:
        total = batch.loss(state)
        for slot in self.slots:
            anchor = slot.read(self.base)
            # vector_norm has the gradient 0 at τ = 0; a root of a sum of squares has none.
            away = torch.linalg.vector_norm(slot.read(state) - anchor)
            wanted = self.distance * torch.linalg.vector_norm(anchor)
            total = total + self.weight * torch.relu(wanted - away)
        return total


def distances(base: State, state: State, slots: tuple[Slot, ...]) -> list[float]:
    """‖W − W0‖ / ‖W0‖ of each slot."""
    return [
        float((slot.read(state) - slot.read(base)).norm() / slot.read(base).norm())
        for slot in slots
    ]
