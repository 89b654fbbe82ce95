"""Control: Gaussian noise on the task vector.

    τ* = τ + σ·ε per tensor, ε ~ N(0, 1), σ = strength · rms(τ)

Merging suffers only as much as the released model itself: the utility gate must reject it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State, task_vector


@dataclass(frozen=True)
class Noise(Defense):
    """Add noise to every tensor that moved.

    Attributes:
        strength: standard deviation of the noise in units of each tensor's rms(τ). Fine-tuning
            moves little: on MiniLM (R8) 30 costs a point, 100 leaves at most the majority class.
    """

    strength: float = 100.0

    card: ClassVar[Card] = Card(
        summary="Control: Gaussian noise on the task vector, which must cost utility",
        role="control",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"need strength >= 0, got {self.strength}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = dict(victim.expert)
        for key, delta in task_vector(victim.expert, victim.base).items():
            sigma = self.strength * delta.double().square().mean().sqrt()
            noise = torch.randn(delta.shape, generator=rng).to(delta.device)
            state[key] = (victim.expert[key] + sigma * noise).to(delta.dtype)
        return state
