"""Merging in a basis that the experts' updates share: what KnOTS and Core have in common.

Per weight matrix, the updates ΔW_i are written in common directions; their coordinates are merged
by task arithmetic or TIES as if they were the weights, and the result is mapped back. Tensors that
are no matrices (biases, norms) are merged by the same inner method as they are. Fused or transposed
projections (QKV in one tensor) are taken apart by the anatomy where the merger is given it.

Task arithmetic is linear, so inside any basis that holds all updates it is plain task arithmetic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, Slot
from benchmark.api.contracts import Knowledge, Setting
from benchmark.core.lowrank import rounding
from benchmark.core.state import State
from benchmark.merging.linear import TaskArithmetic
from benchmark.merging.streaming import differences, moved, wide
from benchmark.merging.tau import GridMerger, active, searched
from benchmark.merging.ties import Scope, Ties

#: Coordinates of each update, and what maps coordinates back to an update (n, m).
Coordinates = tuple[list[Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class SharedBasisMerger(GridMerger):
    """``inner`` on the coordinates of the updates.

    Attributes:
        inner: what merges the coordinates.
        density, scope, normalize: of TIES, as in :class:`benchmark.merging.ties.Ties`;
            ``global`` counts the coordinates and other tensors that moved.
    """

    inner: Literal["ties", "task-arithmetic"] = "ties"
    density: float = 0.2
    scope: Scope = "global"
    normalize: bool = False
    grid: tuple[float, ...] = searched((0.0, 0.5, 1.0, 1.5))
    shared: tuple[float, ...] = searched((0.3, 0.5, 0.7, 1.0, 1.5))

    reads_anatomy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._merger()

    def search_space(self, members: int) -> list[Setting]:
        """That of ``inner``."""
        return self._merger().search_space(members)

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        places = _places(knowledge.anatomy if knowledge else None)
        made: dict[tuple[int, ...], _Space] = {}

        def merged(setting: Setting) -> State:
            members = active(setting, len(experts))
            present = tuple(i for i, _ in members)
            if not present:
                return dict(base)
            if present not in made:
                # The basis is that of those who take part: 0 means the same as leaving out.
                made[present] = self._space(base, [experts[i] for i in present], places, rng)
            coefficients = tuple(c for _, c in members)
            return made[present].merged(Setting(coefficients, setting.parameters))

        return merged

    @abstractmethod
    def _coordinates(self, deltas: list[Tensor], floor: float) -> Coordinates:
        """``deltas``: the updates (n, m) of one matrix, float64; singular values up to ``floor``
        are rounding.
        """

    def _merger(self) -> TaskArithmetic | Ties:
        if self.inner == "task-arithmetic":
            return TaskArithmetic(self.fixed, self.per, self.bands, self.grid, self.shared)
        return Ties(
            fixed=self.fixed,
            per=self.per,
            bands=self.bands,
            grid=self.grid,
            shared=self.shared,
            density=self.density,
            scope=self.scope,
            normalize=self.normalize,
        )

    def _space(
        self,
        base: State,
        experts: list[State],
        places: dict[str, list[Slot]],
        rng: torch.Generator,
    ) -> _Space:
        start: State = {}
        coordinates: list[State] = [{} for _ in experts]
        back: list[tuple[str, Slot, Callable[[Tensor], Tensor]]] = []
        for key in moved(differences(expert, base) for expert in experts):
            if base[key].ndim < 2:
                start[key] = base[key]
                for own, expert in zip(coordinates, experts, strict=True):
                    own[key] = expert[key]
                continue
            for number, slot in enumerate(places.get(key, [Slot(key)])):
                weights = [slot.read(state).flatten(1) for state in (base, *experts)]
                deltas = [weight.double() - weights[0].double() for weight in weights[1:]]
                found, decode = self._coordinates(deltas, rounding(*weights))
                # No State names its tensors so.
                name, dtype = f"{key}[{number}]", wide(base[key]).dtype
                start[name] = torch.zeros_like(found[0], dtype=dtype)
                for own, value in zip(coordinates, found, strict=True):
                    own[name] = value.to(dtype)
                back.append((name, slot, decode))
        return _Space(base, start, self._merger().prepare(start, coordinates, None, rng), back)


@dataclass(frozen=True)
class _Space:
    """One choice of members: merges coordinates (``merge``), and maps them ``back``."""

    base: State
    start: State
    merge: Callable[[Setting], State]
    back: list[tuple[str, Slot, Callable[[Tensor], Tensor]]]

    def merged(self, setting: Setting) -> State:
        found = self.merge(setting)
        out = dict(self.base)
        out.update({key: value for key, value in found.items() if key in self.base})
        for name, slot, decode in self.back:
            old = slot.read(out)
            step = decode(found[name].double()).reshape(old.shape)
            slot.write(out, (old.double() + step).to(wide(old).dtype))
        return out


def _places(anatomy: Anatomy | None) -> dict[str, list[Slot]]:
    """key → the matrices in it, for the tensors that hold several or a transposed one."""
    found: dict[str, list[Slot]] = {}
    if anatomy is not None:
        attention = (lin for block in anatomy.attention for lin in block.linears().values())
        mlp = (lin for block in anatomy.mlp for lin in (block.up, block.gate, block.down) if lin)
        for linear in (*attention, *mlp):
            found.setdefault(linear.weight.key, []).append(linear.weight)
    return found
