"""Gauges of the residual stream as a whole: its axis renamed, its signs, its rotation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.assignment import assign
from benchmark.anatomy.blocks import Axis, Linear
from benchmark.anatomy.gauges.base import (
    Element,
    Gauge,
    directions,
    orthogonal,
    reciprocal,
    trusted,
)
from benchmark.anatomy.gauges.wiring import (
    Segment,
    Stream,
    columns,
    matrix,
    vector,
    whole,
    write_columns,
    write_matrix,
)
from benchmark.anatomy.nest import nearest
from benchmark.core.state import State

#: Far above rounding in float32, far below what embeddings have along 1.
_NOISE = 1e-5


@dataclass(frozen=True)
class StreamGauge(Gauge):
    """One that acts on everything along the residual axis."""

    stream: Stream

    def outer(self, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """What lies along the axis and along no axis that an inner gauge moves: (d, m) each.

        Embeddings and heads, these with the gain of their norm.
        """
        for axis in dict.fromkeys(a for s in self.stream.segments for a in s.embeddings):
            yield matrix(axis, state)
        for segment in self.stream.segments:
            if segment.head:
                for reader in segment.readers:
                    yield folded(segment, reader, state)

    def pairs(
        self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`outer` of both, every column a unit vector: none weighs more for being long."""
        for own, goal in zip(self.outer(state), self.outer(anchor), strict=True):
            yield directions(own), directions(goal)


@dataclass(frozen=True)
class StreamPermutation(StreamGauge):
    """Dimension i of the stream becomes the old dimension π(i), gains and layer scales along."""

    kind: ClassVar[str] = "stream-permutation"

    def draw(self, rng: torch.Generator) -> Element:
        return (torch.randperm(self.stream.width, generator=rng),)

    def move(self, state: State, element: Element) -> None:
        for axis in self._axes:
            value = axis.read(state)
            axis.write(state, value[element[0].to(value.device)])

    def inverse(self, element: Element) -> Element:
        return (element[0].argsort(),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """One assignment on embeddings and heads, whatever the signs of :class:`StreamSign`."""
        own, goal = (
            torch.cat(list(side), 1) for side in zip(*self.pairs(state, anchor), strict=True)
        )
        inner = goal @ own.T
        if not self.stream.centred:
            return (assign(inner.abs() - own.square().sum(1) / 2),)
        orders = [assign(sign * inner - own.square().sum(1) / 2) for sign in (1, -1)]
        rows = torch.arange(len(inner), device=inner.device)
        found = [
            inner[rows, order.to(inner.device)].sum() * sign
            for order, sign in zip(orders, (1, -1), strict=True)
        ]
        return (orders[0] if found[0] >= found[1] else orders[1],)

    @cached_property
    def _axes(self) -> tuple[Axis, ...]:
        found: list[Axis] = []
        for segment in self.stream.segments:
            found += segment.axes
            found += [Axis(norm.gain, 0) for norm in (*segment.sources, *segment.norms)]
            found += [Axis(w.scale, 0) for w in segment.writers if w.scale is not None]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class StreamSign(StreamGauge):
    """Dimensions of the stream × ±1, gains as they are; with LayerNorm all of one sign."""

    kind: ClassVar[str] = "stream-sign"

    def draw(self, rng: torch.Generator) -> Element:
        size = 1 if self.stream.centred else self.stream.width
        drawn = torch.randint(0, 2, (size,), generator=rng) * 2 - 1
        return (drawn.double().expand(self.stream.width),)

    def move(self, state: State, element: Element) -> None:
        for axis in dict.fromkeys(a for s in self.stream.segments for a in s.axes):
            value = axis.read(state)
            sign = element[0].to(value)
            axis.write(state, value * sign.reshape(-1, *[1] * (value.ndim - 1)))

    def inverse(self, element: Element) -> Element:
        return element

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        inner = torch.stack([(x * x0).sum(1) for x, x0 in self.pairs(state, anchor)]).sum(0)
        if self.stream.centred:
            inner = inner.sum().expand(len(inner))
        return (torch.where(inner < 0, -1.0, 1.0).double(),)


@dataclass(frozen=True)
class StreamRotation(StreamGauge):
    """The stream rotated by R: what enters it × R, what reads it × Rᵀ, gains folded in between.

    With γ and λ the gains and layer scales, which stay: X → R·X, λ⊙W → R·(λ⊙W), and readers
    W·diag(γ) → W·diag(γ)·Rᵀ, β/γ → R·β/γ. RMSNorm commutes with every orthogonal R; LayerNorm,
    which takes the mean off first, with those that keep the direction 1.
    """

    kind: ClassVar[str] = "stream-rotation"

    def draw(self, rng: torch.Generator) -> Element:
        size = self.stream.width
        if not self.stream.centred:
            return (orthogonal(size, rng),)
        return (_keeping_ones(orthogonal(size - 1, rng)),)

    def move(self, state: State, element: Element) -> None:
        embeddings = dict.fromkeys(a for s in self.stream.segments for a in s.embeddings)
        for axis in embeddings:
            value = matrix(axis, state)
            write_matrix(axis, state, element[0].to(value.device) @ value)
        for segment in self.stream.segments:
            self._writers(segment, state, element[0])
            self._readers(segment, state, element[0])

    def inverse(self, element: Element) -> Element:
        return (element[0].T,)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Procrustes on embeddings and heads, which match the hidden units; then on these too.

        The second is what answers where the first has fewer columns than dimensions. Biases of
        norms that no shift moves tell the sign of the direction 1, where neither does.
        """
        cross = torch.stack([x0 @ x.T for x, x0 in self.pairs(state, anchor)]).sum(0)
        means = (
            torch.stack([*self._means(source), cross.new_zeros(())]) for source in (state, anchor)
        )
        lean = float(torch.dot(*means))
        first = self._polar(cross, lean)
        for segment, linears in self._units:
            own, goal = (
                [folded(segment, linear, source) for linear in linears]
                for source in (state, anchor)
            )
            turned, fixed = (torch.cat(side).T.float() for side in ([first @ x for x in own], goal))
            order = nearest(turned, fixed).to(cross.device)
            for x, x0 in zip(own, goal, strict=True):
                cross = cross + directions(x0) @ directions(x)[:, order].T
        return (self._polar(cross, lean),)

    def closest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Procrustes on everything along the axis, once the gauges inside are undone."""
        cross = torch.zeros((), dtype=torch.float64)
        for segment in self.stream.segments:
            for pair in zip(_all(segment, state), _all(segment, anchor), strict=True):
                own, goal = trusted(*pair)
                cross = cross.to(own.device) + goal @ own.T
        return (self._polar(cross),)

    def _polar(self, cross: Tensor, lean: float = 1.0) -> Tensor:
        """argmax of ⟨R, cross⟩ over the rotations of the stream; of the sign of ``lean`` along 1
        where ``cross`` says nothing of it."""
        if not self.stream.centred:
            u, _, v = torch.linalg.svd(cross)
            return u @ v
        mirror = _mirror(len(cross)).to(cross)
        inside = mirror @ cross @ mirror
        u, _, v = torch.linalg.svd(inside[1:, 1:])
        # In standard form little lies along 1: nothing, or its sign would be noise.
        along = float(inside[0, 0]) if inside[0, 0].abs() > _NOISE * inside.norm() else lean
        return _keeping_ones(u @ v, sign=-1 if along < 0 else 1)

    @cached_property
    def _units(self) -> list[tuple[Segment, tuple[Linear, ...]]]:
        """Of each MLP the rows that no factor per unit changes but the standard one's."""
        found: list[tuple[Segment, tuple[Linear, ...]]] = []
        for segment in self.stream.segments:
            for mlp in self.stream.mlps:
                if whole(mlp.up) in segment.readers:
                    found.append((segment, (mlp.gate or mlp.up,)))
        return found

    def _means(self, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """How far β/γ lies along 1, of norms whose β is no gauge: a reader has no bias."""
        for segment in self.stream.segments:
            if any(reader.bias is None for reader in segment.readers):
                for norm in segment.sources:
                    if norm.bias is not None:
                        yield (vector(norm.bias, state) / vector(norm.gain, state)).mean()

    @staticmethod
    def _writers(segment: Segment, state: State, r: Tensor) -> None:
        for writer in segment.writers:
            for slot in writer.linear.slots():
                axis = Axis(slot, 0)
                value = matrix(axis, state)
                turn = r.to(value.device)
                if writer.scale is not None:
                    scale = vector(writer.scale, state)
                    turn = reciprocal(scale)[:, None] * turn * scale
                write_matrix(axis, state, turn @ value)

    @staticmethod
    def _readers(segment: Segment, state: State, r: Tensor) -> None:
        for norm in segment.sources:
            gain = vector(norm.gain, state)
            turn = r.to(gain.device)
            for reader in segment.readers:
                value = columns(reader, state)
                around = reciprocal(gain)[:, None] * turn * gain
                write_columns(reader, state, torch.tensordot(around, value, 1))
            if norm.bias is not None:
                norm.bias.write(state, gain * (turn @ (vector(norm.bias, state) / gain)))


def _all(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """What lies along the axis, gains and layer scales folded in: (d, m) each."""
    for axis in segment.embeddings:
        yield matrix(axis, state)
    for writer in segment.writers:
        for slot in writer.linear.slots():
            value = matrix(Axis(slot, 0), state)
            yield value if writer.scale is None else vector(writer.scale, state)[:, None] * value
    for reader in segment.readers:
        yield folded(segment, reader, state)


def folded(segment: Segment, reader: Linear, state: Mapping[str, Tensor]) -> Tensor:
    """A reader's columns with the gain of the norm before it: (d, m)."""
    value = columns(reader, state).flatten(1)
    for norm in segment.sources:
        value = vector(norm.gain, state)[:, None] * value
    return value


def _mirror(size: int) -> Tensor:
    """The reflection that takes the direction 1 to the first axis: (size, size)."""
    v = torch.full((size,), size**-0.5, dtype=torch.float64)
    v[0] -= 1
    return torch.eye(size, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)


def _keeping_ones(inner: Tensor, sign: int = 1) -> Tensor:
    """The rotation that takes 1 to ``sign``·1 and turns what is orthogonal to it by ``inner``."""
    mirror = _mirror(len(inner) + 1).to(inner)
    return mirror @ torch.block_diag(inner.new_full((1, 1), sign), inner) @ mirror
