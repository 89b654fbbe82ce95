"""Ablation: only the norms of a lock, without its directions.

One factor c for all heads and units::

    Q → c·Q, K → K/c, V → c·V, O → O/c          (biases of q, k, v likewise)
    up → c·up, down → down/c                    (gated MLPs, whose up is free of an activation)

What this protects, a lock protects by the size of its weights alone; a merger that matches norms
undoes it. Under QK-norm no scale is free, so Q and K stay as they are
(:func:`benchmark.anatomy.within`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import MLPBlock, apply_qk, apply_vo, within
from benchmark.checkpoint import State
from benchmark.contracts import Card, Defense, Victim


@dataclass(frozen=True)
class NormInflation(Defense):
    """Scale Q/K, V/O and up/down against each other.

    Attributes:
        factor: c. 20 is the largest factor that PaRaMS draws.
    """

    factor: float = 20.0

    card: ClassVar[Card] = Card(
        summary="Ablation: scales Q, V and gated up by one factor, and K, O and down back",
        exact=True,
        role="control",
        architectures="any; V/O everywhere, Q/K except under QK-norm, up/down of gated MLPs only",
        notes="ablation of the locks: norms without directions",
    )

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"need factor > 0, got {self.factor}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = dict(victim.expert)
        for block in victim.anatomy.attention:
            device = state[block.q.weight.key].device
            eye = torch.eye(block.head_dim, dtype=torch.float64, device=device)
            matrices = (self.factor * eye).expand(block.kv_heads, -1, -1)
            apply_qk(state, block, within(block, matrices))
            apply_vo(state, block, matrices)
        for mlp in victim.anatomy.mlp:
            if mlp.gate is not None:
                self._scale(state, mlp)
        return state

    def _scale(self, state: State, block: MLPBlock) -> None:
        for slot in block.up.slots():
            slot.write(state, self.factor * slot.read(state).double())
        down = block.down.weight
        down.write(state, down.read(state).double() / self.factor)
