"""Gauges that multiply: per dimension or unit, per segment of the stream, per head of a QK-norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy.alignment import best_factors, head_sides
from benchmark.anatomy.blocks import AttentionBlock, Axis, Channels, MLPBlock, Slot
from benchmark.anatomy.gauge import scale_units
from benchmark.anatomy.gauges.base import (
    Abelian,
    Element,
    Overlap,
    Scale,
    best_factor,
    log_uniform,
    reciprocal,
    trusted,
)
from benchmark.anatomy.gauges.wiring import matrix, vector
from benchmark.core.state import State

_SIDES: tuple[Literal["q", "k"], ...] = ("q", "k")


@dataclass(frozen=True)
class PerUnit(Scale):
    """One factor c per unit: axes of power 1 × c, of power −1 / c.

    In standard form ``pinned`` (a gain) is 1, or without it what is multiplied has length 1.
    """

    units: MLPBlock | Channels
    size: int
    pinned: Slot | None = None

    def draw(self, rng: torch.Generator) -> Element:
        return (log_uniform((self.size,), rng, 0.25, 4.0),)

    def move(self, state: State, element: Element) -> None:
        scale_units(state, self.units, element[0].to(state[self.units.axes[0].slot.key].device))

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        if self.pinned is not None:
            return (reciprocal(vector(self.pinned, state)),)
        made = [matrix(axis, state) for axis in self.units.axes if axis.power == 1]
        return (reciprocal(torch.cat(made, 1).norm(dim=1)),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """The factors of least distance, of the signs that ``units.unit_scale`` allows."""

        def overlaps(power: int) -> Tensor:
            """‖x‖² and ⟨x, x0⟩ per unit: (2, n)."""
            axes = [axis for axis in self.units.axes if axis.power == power]
            pairs = [trusted(matrix(axis, state), matrix(axis, anchor)) for axis in axes]
            found = [torch.stack([(x * x).sum(1), (x * x0).sum(1)]) for x, x0 in pairs]
            return torch.stack(found).sum(0)

        (xx, on_x), (yy, on_y) = overlaps(1), overlaps(-1)
        if self.units.unit_scale == "positive":
            # A unit that points away from its anchor is better left alone than turned.
            on_x, on_y = on_x.clamp(min=0), on_y.clamp(min=0)
        return (best_factors(xx, yy, on_x, on_y),)


class NormGain(PerUnit):
    """γ → γ ⊙ s, β → β ⊙ s, readers' columns / s."""

    kind: ClassVar[str] = "norm-gain"


class LayerScale(PerUnit):
    """λ → λ ⊙ s, rows and bias of the writer / s."""

    kind: ClassVar[str] = "layer-scale"


class UnitScale(PerUnit):
    """Hidden units × c, what reads them / c: gated MLPs, ReLU."""

    kind: ClassVar[str] = "unit-scale"


@dataclass(frozen=True)
class SegmentScale(Scale):
    """A segment × c: what comes into it × c, what reads it linearly / c; norms ignore it.

    In standard form the median length of the columns of ``measured`` is 1 (that of the product
    Wo·Wv of ``attention``, whose own gauge would change that of Wo alone).
    """

    up: tuple[Axis, ...]
    down: tuple[Axis, ...]
    measured: tuple[Axis, ...]
    attention: AttentionBlock | None = None

    kind: ClassVar[str] = "stream-scale"
    up_to_eps: ClassVar[bool] = True

    def draw(self, rng: torch.Generator) -> Element:
        # A norm's ε weighs 1/c² as much as before, so factors below 1 are not drawn.
        return (log_uniform((), rng, 1.0, 10.0),)

    def move(self, state: State, element: Element) -> None:
        (c,) = element
        for axes, factor in ((self.up, c), (self.down, 1 / c)):
            for axis in axes:
                axis.slot.write(state, axis.slot.read(state).double() * factor)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        if self.attention is not None:
            x, y = head_sides(self.attention, state, "vo")
            return (reciprocal(((x @ x.mT) * (y @ y.mT)).sum().sqrt()),)
        lengths = [matrix(axis, state).norm(dim=0) for axis in self.measured]
        return (reciprocal(torch.cat(lengths).median()),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        up, down = (
            Overlap.of_trusted((matrix(a, state), matrix(a, anchor)) for a in axes)
            for axes in (self.up, self.down)
        )
        return (torch.tensor(best_factor(up, down if self.down else None), dtype=torch.float64),)


class NormScale(SegmentScale):
    """The same for a segment that a norm gives: its gain and bias, and the writer behind it."""

    kind: ClassVar[str] = "norm-scale"


@dataclass(frozen=True)
class QueryKeyGain(Scale):
    """Gains of QK-norm: γ_q ⊙ s, γ_k / s, equal within a rotary pair; of each KV head where the
    norm is over all of them; of all streams in the heads alike."""

    block: AttentionBlock
    gains: tuple[tuple[Slot, Slot], ...]

    kind: ClassVar[str] = "qk-gain"

    def draw(self, rng: torch.Generator) -> Element:
        block = self.block
        size = block.head_dim * (block.kv_heads if block.whole_norm else 1)
        return (log_uniform((size // self._pair,), rng, 0.25, 4.0),)

    def move(self, state: State, element: Element) -> None:
        s = element[0].to(state[self.gains[0][0].key].device)
        for both in self.gains:
            for slot, factor in zip(both, (s, 1 / s), strict=True):
                self._write(slot, state, self._pairs(slot, state) * factor)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return (reciprocal(self._all(0, state).norm(dim=0)),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        q, k = (
            [Overlap.of([pair]) for pair in zip(own.T, goal.T, strict=True)]
            for own, goal in ([self._all(side, s) for s in (state, anchor)] for side in (0, 1))
        )
        found = [best_factor(*both) for both in zip(q, k, strict=True)]
        device = state[self.gains[0][0].key].device
        return (torch.tensor(found, dtype=torch.float64, device=device),)

    @property
    def _pair(self) -> int:
        return 2 if self.block.rotary else 1

    def _all(self, side: int, state: Mapping[str, Tensor]) -> Tensor:
        """:meth:`_pairs` of the queries (0) or keys (1) of all streams."""
        return torch.cat([self._pairs(both[side], state) for both in self.gains])

    def _pairs(self, slot: Slot, state: Mapping[str, Tensor]) -> Tensor:
        """What shares a factor, in columns: (query heads of a group × pair, factors)."""
        return self._split(vector(slot, state)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def _write(self, slot: Slot, state: State, value: Tensor) -> None:
        """The inverse of :meth:`_pairs`."""
        groups, *rest = self._split(slot.read(state)).shape
        spread = value.reshape(rest[0], rest[1], groups, rest[2]).permute(2, 0, 1, 3)
        slot.write(state, (spread.mT if self.block.interleaved else spread).flatten())

    def _split(self, gain: Tensor) -> Tensor:
        """(KV heads of the gain, query heads of each, pair, pairs)."""
        groups = self.block.kv_heads if self.block.whole_norm else 1
        pairs = self.block.head_dim // self._pair
        if self.block.interleaved:
            return gain.reshape(groups, -1, pairs, self._pair).mT
        return gain.reshape(groups, -1, self._pair, pairs)


@dataclass(frozen=True)
class QueryKeySign(Abelian):
    """A row of Q in every head, or of K, × −1 with its QK-norm's gain: the norm knows no signs."""

    block: AttentionBlock
    gains: tuple[Slot, Slot]
    sizes: tuple[int, int]

    kind: ClassVar[str] = "qk-sign"

    def draw(self, rng: torch.Generator) -> Element:
        return tuple(
            (torch.randint(0, 2, (n,), generator=rng) * 2 - 1).double() for n in self.sizes
        )

    def move(self, state: State, element: Element) -> None:
        for name, slot, sign in zip(_SIDES, self.gains, element, strict=True):
            value = self.block.read(state, name)
            sign = sign.to(value.device)
            rows = value.reshape(-1, len(sign), value.shape[-1]) * sign[:, None]
            self.block.write(state, name, rows.reshape(value.shape))
            slot.write(state, vector(slot, state) * sign)

    def inverse(self, element: Element) -> Element:
        return element

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return tuple(_signs(vector(slot, state)) for slot in self.gains)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        return tuple(_signs(vector(slot, state) * vector(slot, anchor)) for slot in self.gains)


def _signs(value: Tensor) -> Tensor:
    """+1 or −1, never 0."""
    return torch.where(value < 0, -1.0, 1.0).to(value.dtype)


@dataclass(frozen=True)
class QueryKeyLength(Scale):
    """Rows of Q and of K × c, per head or of all together as their QK-norm is, which ignores it."""

    block: AttentionBlock

    kind: ClassVar[str] = "qk-length"
    up_to_eps: ClassVar[bool] = True

    def draw(self, rng: torch.Generator) -> Element:
        return tuple(
            log_uniform((1 if self.block.whole_norm else heads,), rng, 1.0, 10.0)
            for heads in (self.block.heads, self.block.kv_heads)
        )

    def move(self, state: State, element: Element) -> None:
        for name, factor in zip(_SIDES, element, strict=True):
            value = self._heads(state, name)
            scaled = value * factor.to(value.device)[:, None, None]
            self.block.write(
                state, name, scaled.flatten(0, 1).unflatten(0, (self.block.kv_heads, -1))
            )

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return tuple(
            reciprocal(torch.linalg.vector_norm(self._heads(state, name), dim=(1, 2)))
            for name in _SIDES
        )

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        factors = []
        for name in _SIDES:
            own, goal = (self._heads(source, name) for source in (state, anchor))
            found = [best_factor(Overlap.of([pair])) for pair in zip(own, goal, strict=True)]
            factors.append(own.new_tensor(found))
        return tuple(factors)

    def _heads(self, state: Mapping[str, Tensor], name: Literal["q", "k"]) -> Tensor:
        """What one norm is over: (heads, head_dim, d + 1), or (1, heads·head_dim, d + 1)."""
        value = self.block.read(state, name)
        rows = value.shape[0] * value.shape[1] if self.block.whole_norm else self.block.head_dim
        return value.reshape(-1, rows, value.shape[-1])
