"""The gauge of a norm over single channels, or over groups of them."""

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
    """Filters × c, the gain of their norm × the sign of c: it divides by what the filter gives.

    One c for each channel or group of channels that has a norm of its own.
    """

    norm: InstanceNorm
    groups: int

    kind: ClassVar[str] = "instance-norm"
    up_to_eps: ClassVar[bool] = True

    def draw(self, rng: torch.Generator) -> Element:
        # The norm's ε weighs 1/c² as much as before, so factors below 1 are not drawn.
        sign = torch.randint(0, 2, (self.groups,), generator=rng) * 2 - 1
        return (sign * log_uniform((self.groups,), rng, 1.0, 10.0),)

    def move(self, state: State, element: Element) -> None:
        (c,) = element
        for axis in self._made:
            value = matrix(axis, state)
            write_matrix(axis, state, c.repeat_interleave(len(value) // len(c))[:, None] * value)
        gain = vector(self.norm.gain, state)
        self.norm.gain.write(state, gain * _sign(c).repeat_interleave(len(gain) // len(c)))

    def inverse(self, element: Element) -> Element:
        return (1 / element[0],)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return (_sign(self._gain(state)) * reciprocal(self._filters(state).norm(dim=1)),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        own, goal = (self._filters(source) for source in (state, anchor))
        inner = (own * goal).sum(1)
        # A filter that points away from its anchor is better left alone than turned.
        gains = vector(self.norm.gain, state) * vector(self.norm.gain, anchor)
        sign = _sign(gains.reshape(self.groups, -1).sum(1))
        gained = sign * inner > 0
        factor = inner / own.square().sum(1).clamp_min(TINY)
        return (torch.where(gained, factor, sign),)

    def _filters(self, state: Mapping[str, Tensor]) -> Tensor:
        """All that is scaled: (groups, m)."""
        made = torch.cat([matrix(axis, state) for axis in self._made], 1)
        return made.reshape(self.groups, -1)

    def _gain(self, state: Mapping[str, Tensor]) -> Tensor:
        """One number of each group that turns with it."""
        return vector(self.norm.gain, state).reshape(self.groups, -1).sum(1)

    @property
    def _made(self) -> tuple[Axis, ...]:
        return (Axis(self.norm.conv.weight, 0), *(Axis(slot, 0) for slot in self.norm.also))


def _sign(value: Tensor) -> Tensor:
    """+1 or −1, never 0."""
    return torch.where(value < 0, -1.0, 1.0).to(value.dtype)
