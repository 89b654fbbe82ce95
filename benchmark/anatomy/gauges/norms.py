"""Gauges of what a norm gives: gain, bias, and the direction that LayerNorm never takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.blocks import Linear, Slot
from benchmark.anatomy.gauges.base import Element, Shift, normal, reciprocal, trusted
from benchmark.anatomy.gauges.wiring import (
    Norm,
    add_to,
    columns,
    unit,
    vector,
    write_columns,
)
from benchmark.core.state import State


@dataclass(frozen=True)
class NormShift(Shift):
    """β → β + δ, readers' b → b − W·δ; ``writer``: a bias that is added later, b → b − δ.

    A reader without a bias gives keys, whose constants softmax ignores.
    """

    norm: Norm
    readers: tuple[Linear, ...]
    width: int
    writer: Slot | None = None

    kind: ClassVar[str] = "norm-shift"

    def draw(self, rng: torch.Generator) -> Element:
        return (normal((self.width,), rng, 0.5),)

    def move(self, state: State, element: Element) -> None:
        (delta,) = element
        add_to(self.norm.bias, state, delta)
        for reader in self._answering:
            add_to(reader.bias, state, -columns(reader, state).sum(2).T @ delta)
        if self.writer is not None:
            add_to(self.writer, state, -delta)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        assert self.norm.bias is not None
        return (-vector(self.norm.bias, state),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Least squares over the biases that move."""
        assert self.norm.bias is not None
        right = vector(self.norm.bias, anchor) - vector(self.norm.bias, state)
        left = torch.eye(self.width, dtype=right.dtype, device=right.device)
        for reader in self._answering:
            assert reader.bias is not None
            own, goal = (
                torch.cat([columns(reader, s).sum(2), vector(reader.bias, s)[None]])
                for s in (state, anchor)
            )
            own, goal = trusted(own, goal)
            weight = own[:-1]
            right = right + weight @ (own[-1] - goal[-1])
            left = left + weight @ weight.T
        if self.writer is not None:
            right = right + vector(self.writer, state) - vector(self.writer, anchor)
            left = left + torch.eye(self.width, dtype=right.dtype, device=right.device)
        return (torch.linalg.solve(left, right),)

    @property
    def _answering(self) -> tuple[Linear, ...]:
        return tuple(reader for reader in self.readers if reader.bias is not None)


@dataclass(frozen=True)
class NullDirection(Shift):
    """W → W + v·uᵀ, b → b − v·⟨u, β⟩ with u along 1/γ, for one reader of a LayerNorm.

    A LayerNorm gives γ ⊙ x̂ + β with Σx̂ = 0, so along 1/γ it is constant. (Each tap of a spatial
    convolution has its own v.)
    """

    norm: Norm
    reader: Linear
    shape: tuple[int, int]  # outputs, taps

    kind: ClassVar[str] = "null-direction"

    def draw(self, rng: torch.Generator) -> Element:
        return (normal(self.shape, rng, 1.0),)

    def move(self, state: State, element: Element) -> None:
        (v,) = element
        u, constant = self._direction(state)
        write_columns(self.reader, state, columns(self.reader, state) + u[:, None, None] * v)
        if self.reader.bias is not None:
            add_to(self.reader.bias, state, -constant * v.sum(1))

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        u, _ = self._direction(state)
        return (-torch.einsum("dot,d->ot", columns(self.reader, state), u),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Least squares over weight and bias."""
        u, constant = self._direction(state)
        change = columns(self.reader, anchor) - columns(self.reader, state)
        along = torch.einsum("dot,d->ot", change, u)
        bias = self.reader.bias
        if bias is None:
            return (along,)
        excess = vector(bias, state) - vector(bias, anchor)
        # Σ over taps of (v − along)² + (excess − constant·Σv)²: the same step for every tap.
        taps = self.shape[1]
        step = constant * (excess - constant * along.sum(1)) / (1 + taps * constant**2)
        return (along + step[:, None],)

    def _direction(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        u = unit(reciprocal(vector(self.norm.gain, state)))
        bias = self.norm.bias
        return u, (u.new_zeros(()) if bias is None else u @ vector(bias, state))
