"""The gauge of a norm that each channel has by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.blocks import Axis
from benchmark.anatomy.gauges.base import TINY, Abelian, Element, log_uniform, reciprocal
from benchmark.anatomy.gauges.wiring import InstanceNorm, matrix, vector, write_matrix
from benchmark.core.state import State


@dataclass(frozen=True)
class FilterScale(Abelian):
    """Filters × c, the gain of their norm × the sign of c: it divides by what the filter gives."""

    norm: InstanceNorm
    channels: int

    kind: ClassVar[str] = "instance-norm"
    up_to_eps: ClassVar[bool] = True

    def draw(self, rng: torch.Generator) -> Element:
        # The norm's ε weighs 1/c² as much as before, so factors below 1 are not drawn.
        sign = torch.randint(0, 2, (self.channels,), generator=rng) * 2 - 1
        return (sign * log_uniform((self.channels,), rng, 1.0, 10.0),)

    def move(self, state: State, element: Element) -> None:
        (c,) = element
        write_matrix(self._filters, state, c[:, None] * matrix(self._filters, state))
        self.norm.gain.write(state, vector(self.norm.gain, state) * _sign(c))

    def inverse(self, element: Element) -> Element:
        return (1 / element[0],)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        length = matrix(self._filters, state).norm(dim=1)
        return (_sign(vector(self.norm.gain, state)) * reciprocal(length),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        own, goal = (matrix(self._filters, source) for source in (state, anchor))
        inner = (own * goal).sum(1)
        # A filter that points away from its anchor is better left alone than turned.
        sign = _sign(vector(self.norm.gain, state) * vector(self.norm.gain, anchor))
        gained = sign * inner > 0
        factor = inner / own.square().sum(1).clamp_min(TINY)
        return (torch.where(gained, factor, sign),)

    @property
    def _filters(self) -> Axis:
        return Axis(self.norm.conv.weight, 0)


def _sign(value: Tensor) -> Tensor:
    """+1 or −1, never 0."""
    return torch.where(value < 0, -1.0, 1.0).to(value.dtype)
