"""What mergers share: sums of task vectors, and the grids a free-rider searches."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from benchmark.checkpoint import State
from benchmark.contracts import Knowledge, Merger, Setting
from benchmark.errors import MethodError

#: Coefficients of a two-way merge, each member on its own; 0 leaves the member out.
GRID = (0.0, 0.4, 0.7, 1.0)
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


def check_grid(*grids: tuple[float, ...]) -> None:
    """Raise ValueError unless every grid is non-empty and finite."""
    for grid in grids:
        if not grid or not all(math.isfinite(value) for value in grid):
            raise ValueError(f"a grid needs finite coefficients, got {grid}")


def coefficient_grid(
    members: int, grid: tuple[float, ...], shared: tuple[float, ...]
) -> list[Setting]:
    """The coefficients a free-rider tries; the victim is member 0.

    One or two members: every combination of ``grid`` and 0. More: each λ of ``shared`` for all
    members, for the partners without the victim, and for the partners with the victim at 1.
    """
    if members <= 2:
        options = sorted({0.0, *grid})
        found = [c for c in itertools.product(options, repeat=members) if any(c)]
    else:
        partners = [(value,) * (members - 1) for value in shared if value]
        found = [(p[0], *p) for p in partners]
        found += [(0.0, *p) for p in partners]
        found += [(1.0, *p) for p in partners]
    return [Setting(c) for c in dict.fromkeys(found)]
