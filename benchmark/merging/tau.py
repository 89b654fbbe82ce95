"""What mergers share: sums of task vectors, and the grids a free-rider searches."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmark.checkpoint import State
from benchmark.contracts import Knowledge, Merger, Setting
from benchmark.errors import MethodError

#: Coefficients of a two-way merge, each member on its own; 0 leaves the member out.
GRID = (0.0, 0.5, 1.0)
#: One coefficient shared by the members of a larger merge.
SHARED = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


class PreparedMerger(Merger):
    """A merger whose work is in :meth:`prepare`; ``merge`` is one setting of it."""

    def merge(
        self,
        base: State,
        experts: Sequence[State],
        setting: Setting,
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> State:
        return self.prepare(base, experts, knowledge, rng)(setting)

    @abstractmethod
    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """As in :class:`benchmark.contracts.Merger`."""


def searched(default: Any) -> Any:
    """A field that says which settings are tried, and does not change what a setting gives."""
    return field(default=default, metadata={"search": True})


@dataclass(frozen=True)
class GridMerger(PreparedMerger):
    """A merger with one coefficient per member.

    Attributes:
        fixed: one coefficient for all members, as in the papers' protocols; None: searched.
        grid: values tried in a merge of two (0, leaving a member out, is always tried).
        shared: values tried for a coefficient that members share in larger merges.
    """

    fixed: float | None = searched(None)
    grid: tuple[float, ...] = searched(GRID)
    shared: tuple[float, ...] = searched(SHARED)

    def __post_init__(self) -> None:
        for grid in (self.grid, self.shared, (1.0 if self.fixed is None else self.fixed,)):
            check_grid(grid)

    def search_space(self, members: int) -> list[Setting]:
        """The coefficients a free-rider tries; the victim is member 0.

        Two members: every combination of ``grid`` and 0. More: each λ of ``shared`` for all
        members, for the partners without the victim, and for the partners with the victim at 1.
        Fixed: that λ for all members, and for the partners without the victim.
        """
        if self.fixed is None and members <= 2:
            options = sorted({0.0, *self.grid})
            found = list(itertools.product(options, repeat=members))
        else:
            values = self.shared if self.fixed is None else (self.fixed,)
            pinned = [0.0, 1.0] if self.fixed is None else [0.0]
            found = [(c,) * members for c in values]
            found += [(v, *(c,) * (members - 1)) for v in pinned for c in values]
        return [Setting(c) for c in dict.fromkeys(found) if any(c)]


def active(setting: Setting, members: int) -> list[tuple[int, float]]:
    """(index, coefficient) of the members that are not left out.

    Raises:
        MethodError: the setting is for another number of members.
    """
    if len(setting.coefficients) != members:
        raise MethodError(f"{len(setting.coefficients)} coefficients for {members} models")
    return [(i, c) for i, c in enumerate(setting.coefficients) if c != 0]


def wide(value: Tensor) -> Tensor:
    """Half precision as float32, so that sums are rounded once; other dtypes as they are."""
    return value.float() if value.element_size() < 4 else value


def weighted_sum(base: State, parts: Iterable[tuple[float, State]]) -> State:
    """θ0 + Σ c·τ, summed in the order given. Tensors that no τ holds are shared with ``base``."""
    out = dict(base)
    for coefficient, tau in parts:
        for key, delta in tau.items():
            if out[key] is base[key]:
                out[key] = torch.add(wide(base[key]), wide(delta), alpha=coefficient)
            else:
                out[key].add_(wide(delta), alpha=coefficient)
    return {key: value.to(base[key].dtype) for key, value in out.items()}


def check_grid(grid: tuple[float, ...]) -> None:
    """Raise ValueError unless the grid is non-empty and finite."""
    if not grid or not all(math.isfinite(value) for value in grid):
        raise ValueError(f"a grid needs finite coefficients, got {grid}")
