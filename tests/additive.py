"""Defenses that add to the weights what leaves the function alone and wrecks a merge.

None ships: there is nothing to publish about them but the attack that sees through them. Each
survives gauge alignment, for none moves inside the gauges of the blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.anatomy import MLPBlock, gauges
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State


@dataclass(frozen=True)
class AlongNull(Defense):
    """W + v·uᵀ and b − v·⟨u, β⟩ with u along 1/γ of the LayerNorm before, where γ⊙x̂ + β never
    varies. A partner moves γ, and then it does."""

    size: float = 400.0
    card: ClassVar[Card] = Card("noise along what a LayerNorm never gives", exact=True)

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        group = gauges.of(victim.anatomy, victim.expert).subset(["null-direction"])
        drawn = [tuple(self.size * part for part in element) for element in group.draw(rng)]
        return group.apply(victim.expert, drawn)


@dataclass(frozen=True)
class _Units(Defense):
    """Gives up the ``units`` of each MLP that do least, and puts them to another use."""

    size: float = 100.0
    units: int = 4

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        out = dict(victim.expert)
        for block in victim.anatomy.mlp:
            assert block.up.bias is not None
            assert block.down.bias is not None
            slots = [block.up.weight, block.up.bias, block.down.weight, block.down.bias]
            parts = [slot.read(out).double().clone() for slot in slots]
            useful = (parts[0].norm(dim=1) * parts[2].norm(dim=0)).argsort().tolist()
            for number, unit in enumerate(useful[: self.units]):
                draw = torch.randn(len(parts[2]), generator=rng, dtype=torch.float64)
                self.spoil(block, parts, unit, useful[-1 - number], self.size * draw / draw.norm())
            for slot, part in zip(slots, parts, strict=True):
                slot.write(out, part)
        return out

    @abstractmethod
    def spoil(
        self, block: MLPBlock, parts: list[Tensor], weak: int, strong: int, r: Tensor
    ) -> None:
        """Edit W1, b1, W2, b2. ``r``: a random direction of length ``size``."""


@dataclass(frozen=True)
class CancellingPairs(_Units):
    """The weak unit fires as the strong one does, and takes away what that one adds: r and −r."""

    card: ClassVar[Card] = Card("pairs of hidden units that cancel")

    def spoil(
        self, block: MLPBlock, parts: list[Tensor], weak: int, strong: int, r: Tensor
    ) -> None:
        up, bias, down, _ = parts
        up[weak], bias[weak] = up[strong], bias[strong]
        down[:, strong] += r
        down[:, weak] = -r


@dataclass(frozen=True)
class ConstantUnits(_Units):
    """The weak unit sees nothing and always gives 1; the bias takes that back."""

    card: ClassVar[Card] = Card("hidden units that see nothing")

    def spoil(
        self, block: MLPBlock, parts: list[Tensor], weak: int, strong: int, r: Tensor
    ) -> None:
        up, bias, down, after = parts
        up[weak], bias[weak], down[:, weak] = 0, 1, r
        after -= r * functional.gelu(torch.ones((), dtype=r.dtype))


@dataclass(frozen=True)
class SilentUnits(_Units):
    """The weak unit is far below where it fires, but at half the coefficient it is not."""

    size: float = 1e5
    card: ClassVar[Card] = Card("hidden units that never fire")

    def spoil(
        self, block: MLPBlock, parts: list[Tensor], weak: int, strong: int, r: Tensor
    ) -> None:
        up, bias, down, _ = parts
        up[weak], bias[weak], down[:, weak] = 0, -8, r
