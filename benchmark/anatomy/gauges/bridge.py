"""The gauge of a linear map that only linear maps read: between an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.alignment import fit, tied_gauge
from benchmark.anatomy.gauges.base import Element, Gauge, log_uniform, orthogonal
from benchmark.anatomy.gauges.wiring import Bridge, add_to, columns, vector, write_columns
from benchmark.core.state import State

#: Of a matrix whose smallest singular value is a smaller share of the largest, no inverse is taken.
_SINGULAR = 1e-10


@dataclass(frozen=True)
class BridgeBasis(Gauge):
    """P → A·P, b → A·b, readers W → W·A^-1, for any invertible A (d, d)."""

    bridge: Bridge
    width: int

    kind: ClassVar[str] = "bridge"

    @property
    def smooth(self) -> bool:
        return True

    def at(self, coordinates: Element) -> Element:
        return (torch.linalg.matrix_exp(coordinates[0]),)

    def draw(self, rng: torch.Generator) -> Element:
        # Of condition at most 9, as the matrices of heads are.
        spectrum = log_uniform((self.width,), rng, 1 / 3, 3.0)
        return (orthogonal(self.width, rng) * spectrum @ orthogonal(self.width, rng),)

    def move(self, state: State, element: Element) -> None:
        (a,) = element
        linear = self.bridge.linear
        linear.weight.write(state, a @ linear.weight.read(state).double())
        if linear.bias is not None:
            bias = vector(linear.bias, state)
            add_to(linear.bias, state, a @ bias - bias)
        for reader in self.bridge.readers:
            value = columns(reader, state)
            write_columns(reader, state, torch.linalg.solve(a.mT, value.flatten(1)).view_as(value))

    def inverse(self, element: Element) -> Element:
        return (torch.linalg.inv(element[0]),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """The least squares of what is made alone: the gauges of heads are in what reads it.

        Where that has no inverse (P is zero, or as good as of lower rank), nothing is moved.
        """
        found = fit(self._made(state), self._made(anchor))[0]
        values = torch.linalg.svdvals(found)
        if not bool(values[-1] > _SINGULAR * values[0]):
            return (torch.eye(self.width, dtype=found.dtype, device=found.device),)
        return (found,)

    def closest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Of both sides, once the heads are matched."""
        made, read = ((side(state), side(anchor)) for side in (self._made, self._read))
        return (tied_gauge(*made, *read)[0],)

    def _made(self, state: Mapping[str, Tensor]) -> Tensor:
        """Weight and bias: (1, d, m + 1)."""
        linear = self.bridge.linear
        weight = linear.weight.read(state).double()
        bias = [] if linear.bias is None else [vector(linear.bias, state)[:, None]]
        return torch.cat([weight, *bias], 1)[None]

    def _read(self, state: Mapping[str, Tensor]) -> Tensor:
        """All readers: (1, d, outputs)."""
        found = [columns(reader, state).flatten(1) for reader in self.bridge.readers]
        return torch.cat(found, 1)[None]
