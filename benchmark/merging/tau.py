"""What mergers share: sums of task vectors, and the grids a free-rider searches."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Knowledge, Merger, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.merging.layers import by_layer
from benchmark.merging.streaming import Tau, streamed

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
        return by_layer(self.prepare(base, experts, knowledge, rng), base, setting)

    @abstractmethod
    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """As in :class:`benchmark.api.contracts.Merger`."""


class UnweightedMerger(PreparedMerger):
    """A merger without coefficients: a member is in or out."""

    def search_space(self, members: int) -> list[Setting]:
        return in_or_out(members)


def searched(default: Any) -> Any:
    """A field that says which settings are tried, and does not change what a setting gives."""
    return field(default=default, metadata={"search": True})


@dataclass(frozen=True)
class GridMerger(PreparedMerger):
    """A merger with one coefficient per member.

    Attributes:
        fixed: one coefficient for all members, as in the papers' protocols; None: searched.
        per: what has a coefficient of its own: all together (``shared``), each member (``task``),
            each member in each band of layers (``layer``; members of a merge of three or more share
            it), or ``auto``: ``task`` for two, and for more ``shared``, also with the victim at 1.
        bands: into how many bands ``per=layer`` cuts the layers.
        grid: values tried for a coefficient of its own (0, leaving a member out, always is).
        shared: values tried for a coefficient that members share.
    """

    fixed: float | None = searched(None)
    per: Literal["auto", "shared", "task", "layer"] = searched("auto")
    bands: int = searched(3)
    grid: tuple[float, ...] = searched(GRID)
    shared: tuple[float, ...] = searched(SHARED)

    def __post_init__(self) -> None:
        for grid in (self.grid, self.shared, (1.0 if self.fixed is None else self.fixed,)):
            check_grid(grid)
        if self.bands < 2:
            raise ValueError(f"need at least 2 bands, got {self.bands}")

    def search_space(self, members: int) -> list[Setting]:
        """The coefficients a free-rider tries; the victim is member 0.

        Fixed or shared: that λ for all members, and for all but the victim.
        """
        if self.fixed is not None:
            found = _shared((self.fixed,), members)
        elif self.per == "shared":
            found = _shared(self.shared, members)
        elif self.per == "task" or members <= 2:
            found = list(itertools.product(sorted({0.0, *self.grid}), repeat=members))
        else:
            found = _shared(self.shared, members)
            if self.per == "auto":
                found += [(1.0, *(c,) * (members - 1)) for c in self.shared]
        plain = [Setting(c) for c in dict.fromkeys(found) if any(c)]
        return [*plain, *self._layered(found)] if self._by_layer else plain

    def ratios(self, settings: Sequence[Setting], members: int, scale: str | None) -> list[Setting]:
        """``settings`` up to a common factor, for a formula that divides it out.

        ``scale``: the parameter that sets the factor, tried at each value of a coefficient.
        """
        found: dict[tuple[float, ...], None] = {}
        for setting in settings:
            greatest = max(setting.coefficients, key=abs)
            found[tuple(round(c / greatest, 6) for c in setting.coefficients)] = None
        if scale is None:
            return [Setting(ratio) for ratio in found]
        values = [value for value in (self.grid if members <= 2 else self.shared) if value]
        return [Setting(ratio, {scale: value}) for ratio in found for value in values]

    @property
    def _by_layer(self) -> bool:
        return self.fixed is None and self.per == "layer"

    def _layered(self, rows: Sequence[tuple[float, ...]]) -> Iterator[Setting]:
        """Every combination of ``rows`` over the bands, but the same in all; of members that share
        a coefficient all take part in every band, or all but the victim in none."""
        members = len(rows[0])
        sides = [rows] if members <= 2 else [[r for r in rows if bool(r[0]) == v] for v in (1, 0)]
        for side in sides:
            for layers in itertools.product(side, repeat=self.bands):
                setting = Setting.by_layer(layers)
                if setting.layers and any(setting.coefficients):
                    yield setting


def _shared(values: Sequence[float], members: int) -> list[tuple[float, ...]]:
    everybody = [(c,) * members for c in values]
    return everybody + [(0.0, *row[1:]) for row in everybody]


def in_or_out(members: int) -> list[Setting]:
    """Settings of a merger without coefficients: everybody, and everybody but the victim."""
    everybody = Setting((1.0,) * members)
    return [everybody, Setting((0.0, *(1.0,) * (members - 1)))] if members > 2 else [everybody]


def active(setting: Setting, members: int) -> list[tuple[int, float]]:
    """(index, coefficient) of the members that are not left out.

    Raises:
        MethodError: the setting is for another number of members.
    """
    if len(setting.coefficients) != members:
        raise MethodError(f"{len(setting.coefficients)} coefficients for {members} models")
    return [(i, c) for i, c in enumerate(setting.coefficients) if c != 0]


def weighted_sum(base: State, parts: Iterable[tuple[float, Tau]]) -> State:
    """θ0 + Σ c·τ, summed in the order given. Tensors that no τ holds are shared with ``base``."""
    return streamed(base, list(parts), _sum)


def _sum(start: Tensor, deltas: list[tuple[float, Tensor]]) -> Tensor:
    (coefficient, delta), *others = deltas
    total = torch.add(start, delta, alpha=coefficient)
    for coefficient, delta in others:
        total.add_(delta, alpha=coefficient)
    return total


def check_grid(grid: tuple[float, ...]) -> None:
    """Raise ValueError unless the grid is non-empty and finite."""
    if not grid or not all(math.isfinite(value) for value in grid):
        raise ValueError(f"a grid needs finite coefficients, got {grid}")
