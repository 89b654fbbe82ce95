"""What every gauge can do, and the law its elements are drawn from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmark.core.errors import UsageError
from benchmark.core.state import State

#: The tensors that say which element of a gauge is meant, float64.
Element = tuple[Tensor, ...]

#: Below this a number is not divided by (a dead unit, a gain of zero).
TINY = 1e-30


@dataclass(frozen=True)
class Gauge(ABC):
    """Transforms of a State that keep the function, all of one kind and in one place.

    ``where`` names the place (a norm, a block, a stream); ``kind`` is what locks choose by.
    """

    where: str

    kind: ClassVar[str]
    #: Exact up to the ε that a norm adds to the variance.
    up_to_eps: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.where}"

    @abstractmethod
    def draw(self, rng: torch.Generator) -> Element:
        """A random element, of bounded condition. Depends on shapes alone, never on weights."""

    @abstractmethod
    def move(self, state: State, element: Element) -> None:
        """Apply ``element`` to ``state``, a shallow copy: tensors are replaced, not written to."""

    @abstractmethod
    def inverse(self, element: Element) -> Element:
        """What undoes ``element``."""

    @abstractmethod
    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """The element that brings ``state`` back towards ``anchor``, however far it is."""

    def closest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """The element of least distance, for a ``state`` that is near ``anchor`` already."""
        return self.nearest(state, anchor)

    @property
    def smooth(self) -> bool:
        """Whether it has coordinates (:meth:`at`), so that an element can be learned."""
        return False

    def at(self, coordinates: Element) -> Element:
        """The element with these coordinates, shaped as what :meth:`draw` gives. Zeros are the
        identity, all others have inverses, and the map is differentiable.

        Raises:
            UsageError: the gauge is not ``smooth``.
        """
        raise UsageError(f"{self.name} has no coordinates")

    def apply(self, state: Mapping[str, Tensor], element: Element) -> State:
        """The State with ``element`` applied: computed in float64, cast to the dtypes it had."""
        out = dict(state)
        self.move(out, beside(element, state))
        return out


class Abelian(Gauge):
    """A gauge whose elements commute, so that a State has one standard form under it.

    Two States that differ by an element have the same one, whatever the element was, which needs no
    anchor: that is how the gauges inside it can be compared before this one is known.
    """

    @abstractmethod
    def standard(self, state: Mapping[str, Tensor]) -> Element:
        """The element that brings ``state`` into standard form."""


class Shift(Abelian):
    """An abelian gauge whose elements are added."""

    @property
    def smooth(self) -> bool:
        return True

    def at(self, coordinates: Element) -> Element:
        return coordinates

    def inverse(self, element: Element) -> Element:
        return tuple(-part for part in element)


class Scale(Abelian):
    """An abelian gauge whose elements are factors."""

    @property
    def smooth(self) -> bool:
        return True

    def at(self, coordinates: Element) -> Element:
        return tuple(part.exp() for part in coordinates)

    def inverse(self, element: Element) -> Element:
        return tuple(1 / part for part in element)


def normal(shape: tuple[int, ...], rng: torch.Generator, size: float) -> Tensor:
    """Independent normal entries of standard deviation ``size``, float64."""
    return size * torch.randn(shape, generator=rng, dtype=torch.float64)


def log_uniform(shape: tuple[int, ...], rng: torch.Generator, low: float, high: float) -> Tensor:
    """Independent entries whose logarithm is uniform on [log low, log high), float64."""
    share = torch.rand(shape, generator=rng, dtype=torch.float64)
    return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * share)


def orthogonal(size: int, rng: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix (Mezzadri 2007), float64."""
    q, r = torch.linalg.qr(normal((size, size), rng, 1.0))
    return q * r.diagonal().sign()


def reciprocal(value: Tensor) -> Tensor:
    """1/x, and 1 where x is as good as zero."""
    return torch.where(value.abs() > TINY, 1 / value, torch.ones_like(value))


def trusted(own: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Both (d, m), each column × min(1, ‖goal‖/‖own‖), for a least squares that nobody can buy.

    A unit that never fires, a token that no text holds or a position beyond every text may carry
    anything. A column that is blown up weighs no more than that of the anchor does; where ``own``
    is near its anchor all weights are as good as 1.
    """
    share = (goal.norm(dim=0) / own.norm(dim=0).clamp_min(TINY)).clamp(max=1)
    return own * share, goal * share


def directions(value: Tensor) -> Tensor:
    """The columns of (d, m) as unit vectors; empty ones stay."""
    return value / value.norm(dim=0).clamp_min(TINY)


def middle(value: Tensor) -> Tensor:
    """The mean of the columns of (d, m), without those ten times as far from it as most are.

    Turns with every rotation of the columns, as a median of coordinates does not; what a token that
    no text holds may carry counts for nothing.
    """
    squares = torch.einsum("dm,dm->m", value, value)
    weight = torch.ones_like(squares)
    for _ in range(2):
        center = value @ weight / weight.sum()
        far = squares - 2 * (center @ value) + center @ center
        limit = 100 * far.median() + 1e-12 * squares.median()  # what rounding makes of nothing
        weight = (far <= limit).to(value.dtype)
    return value @ weight / weight.sum()


class Overlap(NamedTuple):
    """‖x‖² and ⟨x, x0⟩ of what a factor multiplies."""

    square: float
    inner: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Overlap:
        """Summed over pairs of tensors of one shape."""
        found = [(float((x * x).sum()), float((x * x0).sum())) for x, x0 in pairs]
        return cls(sum(square for square, _ in found), sum(inner for _, inner in found))

    @classmethod
    def of_trusted(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Overlap:
        """The same of :func:`trusted` columns, which are never written down: pairs of (d, m)."""
        square = inner = 0.0
        for own, goal in pairs:
            xx, goals, both = (
                torch.einsum("dm,dm->m", a, b) for a, b in ((own, own), (goal, goal), (own, goal))
            )
            share = (goals / xx.clamp_min(TINY)).clamp(max=1)
            square, inner = square + float(share @ xx), inner + float(share @ both)
        return cls(square, inner)


def best_factor(up: Overlap, down: Overlap | None = None) -> float:
    """c > 0 that minimises ‖c·x − x0‖² + ‖y/c − y0‖², x of ``up`` and y of ``down``; 1 where
    nothing is won.

    A stationary point solves c⁴‖x‖² − c³⟨x, x0⟩ + c⟨y, y0⟩ − ‖y‖² = 0.
    """
    xx, on_x = up
    yy, on_y = down or (0.0, 0.0)
    if xx <= TINY:
        return 1.0
    if down is None:
        tried = [on_x / xx]
    else:
        roots = np.roots([xx, -on_x, 0.0, on_y, -yy])
        tried = [float(root.real) for root in roots if abs(root.imag) < 1e-9 * abs(root)]
    return min(
        [1.0, *(c for c in tried if TINY < c < 1 / TINY)],
        key=lambda c: c * c * xx - 2 * c * on_x + yy / c**2 - 2 * on_y / c,
    )


def beside(element: Element, state: Mapping[str, Tensor]) -> Element:
    """The element on the device of the State."""
    device = next(iter(state.values())).device
    return tuple(part.to(device) for part in element)
