"""Merge-time answers: the victim pinned where its trap is silent, and a coefficient per task."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import (
    Access,
    Attack,
    Card,
    Knowledge,
    Merger,
    Setting,
)
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.merging.wrapped import WrappedMerger

#: Settings a search may grow to; a grid that gives more is refused, not cut.
MOST = 256


@dataclass(frozen=True)
class Coefficients(Attack):
    """The search space of the merger, replaced: every combination of ``grid``, one per member.

    Attributes:
        grid: values tried for each partner, and for the victim unless ``pin``.
        pin: the victim's coefficient is 1. The release then enters as its owner tested it, and a
            defense that spoils θ0 + s·τ at s ≠ 1 (Trap²) has nothing to act on.
    """

    card: ClassVar[Card] = Card(
        summary="search a coefficient per member, the victim's free or pinned at its nominal 1",
        fidelity="ours",
        exact=True,
        notes="leaves the weights alone: it changes what a merger tries",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    grid: tuple[float, ...] = (0.2, 0.4, 0.7)
    pin: bool = False

    def __post_init__(self) -> None:
        if not self.grid or not all(0 < value <= 2 for value in self.grid):
            raise ValueError(f"grid needs values in (0, 2], got {self.grid}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return dict(released)

    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        return _Searched(merger, self)


@dataclass(frozen=True)
class NominalPin(Coefficients):
    """:class:`Coefficients` with the victim pinned at 1."""

    pin: bool = True


class _Searched(WrappedMerger):
    attack: Coefficients

    def search_space(self, members: int) -> list[Setting]:
        """Raises MethodError: the merger's coefficients are fixed, or too many combinations."""
        grid = self.attack.grid
        victim = (1.0,) if self.attack.pin else tuple(dict.fromkeys((*grid, 1.0)))
        inner = self.inner.search_space(members)
        if len({s.coefficients for s in inner if all(s.coefficients)}) <= 1:
            raise MethodError("the merger's coefficients are fixed")
        parameters = list({repr(s.parameters): s.parameters for s in inner}.values())
        found = list(itertools.product(victim, *([grid] * (members - 1))))
        if len(found) * len(parameters) > MOST:
            raise MethodError(f"{len(found) * len(parameters)} settings: give a shorter grid")
        return [Setting(c, p) for c in found for p in parameters]
