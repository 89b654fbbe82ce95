"""Ablation: only the norms of a lock, without its directions.

One factor c for all heads and units::

    Q → c·Q, K → K/c, V → c·V, O → O/c          (biases of q, k, v likewise)
    up → c·up, down → down/c                    (gated MLPs, whose up is free of an activation)
    norm → c·norm, next convolution → /c        (channels between two convolutions of a ResNet)

What this protects, a lock protects by the size of its weights alone; a merger that matches norms
undoes it. Under QK-norm no scale is free, so Q and K stay as they are
(:func:`benchmark.anatomy.within`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import Channels, MLPBlock, apply_qk, apply_vo, within
from benchmark.anatomy.gauge import scale_units
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.errors import MethodError
from benchmark.core.state import State


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
        architectures="any; V/O everywhere, Q/K except under QK-norm, up/down of gated MLPs, "
        "inner channels under ReLU",
        notes="ablation of the locks: norms without directions",
    )

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"need factor > 0, got {self.factor}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State.

        Raises:
            MethodError: nothing in the model can be scaled (a ConvNeXt).
        """
        state = dict(victim.expert)
        for block in victim.anatomy.attention:
            device = state[block.q.weight.key].device
            eye = torch.eye(block.head_dim, dtype=torch.float64, device=device)
            matrices = (self.factor * eye).expand(block.kv_heads, -1, -1)
            apply_qk(state, block, within(block, matrices))
            apply_vo(state, block, matrices)
        anatomy, factor = victim.anatomy, torch.tensor(self.factor, dtype=torch.float64)
        free: list[MLPBlock | Channels] = [m for m in anatomy.mlp if m.unit_scale == "signed"]
        free += [channels for channels in anatomy.channels if channels.unit_scale is not None]
        for units in free:
            n = units.width(state)
            device = state[units.axes[0].slot.key].device
            scale_units(state, units, factor.to(device).expand(n))
        if all(value is victim.expert[key] for key, value in state.items()):
            raise MethodError(f"norm-inflation finds no free scale in {anatomy.family}")
        return state
