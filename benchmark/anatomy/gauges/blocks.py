"""The gauges inside attention and MLP blocks, by the functions that anatomy has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.alignment import match_heads, match_queries, match_units, qk_gauge, vo_gauge
from benchmark.anatomy.assignment import assign
from benchmark.anatomy.blocks import AttentionBlock, Axis, Channels, MLPBlock
from benchmark.anatomy.coupled import match_coupled
from benchmark.anatomy.gauge import (
    apply_qk,
    apply_vo,
    joined,
    permute_heads,
    permute_queries,
    permute_units,
    rotary_matrix,
    within,
)
from benchmark.anatomy.gauges.base import (
    TINY,
    Element,
    Gauge,
    log_uniform,
    normal,
    orthogonal,
)
from benchmark.anatomy.gauges.wiring import matrix
from benchmark.anatomy.nest import shuffled
from benchmark.core.state import State

#: Factors of the locks: condition at most 9.
_LOW, _HIGH = 1 / 3, 3.0


@dataclass(frozen=True)
class HeadOrder(Gauge):
    """Heads (KV groups) trade places."""

    block: AttentionBlock

    kind: ClassVar[str] = "heads"

    def draw(self, rng: torch.Generator) -> Element:
        return (torch.randperm(self.block.kv_heads, generator=rng),)

    def move(self, state: State, element: Element) -> None:
        permute_heads(state, self.block, element[0])

    def inverse(self, element: Element) -> Element:
        return (element[0].argsort(),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        return (match_heads(self.block, state, anchor),)


@dataclass(frozen=True)
class QueryOrder(Gauge):
    """Query heads that share a key and a value trade places."""

    block: AttentionBlock

    kind: ClassVar[str] = "query-heads"

    def draw(self, rng: torch.Generator) -> Element:
        shape = (self.block.kv_heads, self.block.group)
        return (torch.rand(shape, generator=rng, dtype=torch.float64).argsort(1),)

    def move(self, state: State, element: Element) -> None:
        permute_queries(state, self.block, element[0])

    def inverse(self, element: Element) -> Element:
        return (element[0].argsort(1),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        return (match_queries(self.block, state, anchor),)


@dataclass(frozen=True)
class _Matrices(Gauge):
    """One matrix per KV head."""

    block: AttentionBlock

    @property
    def smooth(self) -> bool:
        return True

    def at(self, coordinates: Element) -> Element:
        return (torch.linalg.matrix_exp(coordinates[0]),)

    def inverse(self, element: Element) -> Element:
        return (torch.linalg.inv(element[0]),)

    def _general(self, rng: torch.Generator, size: int) -> Tensor:
        found = []
        for _ in range(self.block.kv_heads):
            spectrum = log_uniform((size,), rng, _LOW, _HIGH)
            found.append(orthogonal(size, rng) * spectrum @ orthogonal(size, rng))
        return torch.stack(found)


@dataclass(frozen=True)
class QueryKey(_Matrices):
    """Q → A·Q, K → A^-T·K, A of the block's own group: general, rotary or signs."""

    kind: ClassVar[str] = "query-key"

    @property
    def smooth(self) -> bool:
        return self.block.qk_gauge != "sign"

    def at(self, coordinates: Element) -> Element:
        if not self.smooth:
            return Gauge.at(self, coordinates)
        # What commutes with rotations is an algebra: its exponentials are in the group.
        return super().at((within(self.block, coordinates[0]),))

    def draw(self, rng: torch.Generator) -> Element:
        heads, size = self.block.kv_heads, self.block.head_dim
        if self.block.qk_gauge == "general":
            return (self._general(rng, size),)
        if self.block.qk_gauge == "sign":
            return (within(self.block, torch.diag_embed(normal((heads, size), rng, 1.0))),)
        radius = log_uniform((heads, self.block.turning // 2), rng, _LOW, _HIGH)
        angle = 2 * torch.pi * torch.rand(radius.shape, generator=rng, dtype=torch.float64)
        turning = rotary_matrix(radius * angle.cos(), radius * angle.sin())
        return (joined(self.block, turning, self._general(rng, size - self.block.turning)),)

    def move(self, state: State, element: Element) -> None:
        apply_qk(state, self.block, element[0].to(state[self.block.q.weight.key].device))

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        return (qk_gauge(self.block, state, anchor),)


@dataclass(frozen=True)
class ValueOutput(_Matrices):
    """V → B·V, O → O·B^-1."""

    kind: ClassVar[str] = "value-output"

    def draw(self, rng: torch.Generator) -> Element:
        return (self._general(rng, self.block.head_dim),)

    def move(self, state: State, element: Element) -> None:
        apply_vo(state, self.block, element[0].to(state[self.block.q.weight.key].device))

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        return (vo_gauge(self.block, state, anchor),)


@dataclass(frozen=True)
class UnitOrder(Gauge):
    """Hidden units of an MLP trade places; channels of convolutions, all groups in one element."""

    units: tuple[MLPBlock | Channels, ...]
    widths: tuple[int, ...]

    kind: ClassVar[str] = "units"

    def draw(self, rng: torch.Generator) -> Element:
        return tuple(
            shuffled(width, units.nest, rng)
            for units, width in zip(self.units, self.widths, strict=True)
        )

    def move(self, state: State, element: Element) -> None:
        for units, order in zip(self.units, element, strict=True):
            permute_units(state, units, order)

    def inverse(self, element: Element) -> Element:
        return tuple(order.argsort() for order in element)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        if any(isinstance(units, Channels) for units in self.units):
            return tuple(match_coupled(self.units, state, anchor))
        return tuple(
            _match_signed(units, state, anchor)
            if units.unit_scale == "signed"
            else match_units(units, state, anchor)
            for units in self.units
        )


def _match_signed(
    units: MLPBlock | Channels, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """Units of a gated MLP, whose up and down may have changed their signs together."""

    def inner(power: int, *, fixed: bool) -> Tensor:
        axes = [a for a in units.axes if (a.power == 0) == fixed and a.power in (0, power)]
        sides = [_rows(axes, source) for source in (state, anchor)]
        return sides[1] @ sides[0].T / sides[1].square().mean().clamp_min(TINY)

    return assign(inner(0, fixed=True) + (inner(1, fixed=False) + inner(-1, fixed=False)).abs())


def _rows(axes: list[Axis], state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([matrix(axis, state) for axis in axes], 1).float()
