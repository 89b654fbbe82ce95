"""Gauges that add a constant: along 1, between embeddings, to values and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Axis, Slot
from benchmark.anatomy.gauges.base import Element, Shift, middle, normal, reciprocal
from benchmark.anatomy.gauges.wiring import (
    Part,
    add_to,
    matrix,
    unit,
    vector,
    write_matrix,
)
from benchmark.core.state import State


@dataclass(frozen=True)
class Constant(Shift):
    """X → X + 1·aᵀ for one tensor of a segment that only LayerNorms read: they remove the mean.

    ``scale``: a layer scale λ between the tensor and the stream, where 1 becomes 1/λ. ``also``:
    further names of the tensor.
    """

    axis: Axis
    columns: int
    scale: Slot | None = None
    also: tuple[Axis, ...] = ()

    kind: ClassVar[str] = "constant"

    def draw(self, rng: torch.Generator) -> Element:
        return (normal((self.columns,), rng, 1.0),)

    def move(self, state: State, element: Element) -> None:
        constant = self._direction(state)[:, None] * element[0]
        for axis in (self.axis, *self.also):
            write_matrix(axis, state, matrix(axis, state) + constant)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return (-self._direction(state) @ matrix(self.axis, state),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        change = matrix(self.axis, anchor) - matrix(self.axis, state)
        return (self._direction(state) @ change,)

    def _direction(self, state: Mapping[str, Tensor]) -> Tensor:
        if self.scale is not None:
            return unit(reciprocal(vector(self.scale, state)))
        ones = matrix(self.axis, state)
        return unit(torch.ones(len(ones), dtype=ones.dtype, device=ones.device))


@dataclass(frozen=True)
class EmbeddingShift(Shift):
    """Embeddings of which one of each side is always added: + v on one side, − v on the other."""

    first: tuple[Part, ...]
    second: tuple[Part, ...]
    width: int

    kind: ClassVar[str] = "embedding-shift"

    def draw(self, rng: torch.Generator) -> Element:
        return (normal((self.width,), rng, 0.3),)

    def move(self, state: State, element: Element) -> None:
        for sign, parts in ((1, self.first), (-1, self.second)):
            for part in parts:
                part.add(state, sign * element[0])

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        """Minus the middle of the larger side."""
        sides = [[part.read(state) for part in parts] for parts in (self.first, self.second)]
        # A vocabulary is not copied for nothing.
        first, second = (side[0] if len(side) == 1 else torch.cat(side, 1) for side in sides)
        return (-middle(first) if first.shape[1] >= second.shape[1] else middle(second),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        changes = []
        for sign, parts in ((1, self.first), (-1, self.second)):
            for part in parts:
                changes.append(sign * (part.read(anchor) - part.read(state)))
        return (torch.cat(changes, 1).median(1).values,)


@dataclass(frozen=True)
class ValueShift(Shift):
    """b_v → b_v + δ, b_o → b_o − Wo·δ: the weights of attention sum to 1.

    Of two streams in the same heads both, by the same δ.
    """

    block: AttentionBlock

    kind: ClassVar[str] = "value-shift"

    def draw(self, rng: torch.Generator) -> Element:
        return (normal((self.block.kv_heads * self.block.head_dim,), rng, 0.5),)

    def move(self, state: State, element: Element) -> None:
        for slot in self.block.biases("v"):
            add_to(slot, state, element[0])
        change = -self._output(state) @ element[0]
        parts = change.split([len(slot.read(state)) for slot in self.block.biases("o")])
        for slot, part in zip(self.block.biases("o"), parts, strict=True):
            add_to(slot, state, part)

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return (-vector(self.block.biases("v")[0], state),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """Least squares over both biases."""
        output = self._output(state)
        streams = self.block.biases("v")
        values = torch.stack([vector(s, state) - vector(s, anchor) for s in streams]).sum(0)
        outputs = torch.cat(
            [vector(slot, state) - vector(slot, anchor) for slot in self.block.biases("o")]
        )
        left = len(streams) * torch.eye(len(values), dtype=values.dtype, device=values.device)
        return (torch.linalg.solve(left + output.T @ output, output.T @ outputs - values),)

    def _output(self, state: Mapping[str, Tensor]) -> Tensor:
        """What a value adds to the stream, over all queries of a group: (d, kv_heads·head_dim)."""
        return self.block.read_o(state).sum(1).permute(1, 0, 2).flatten(1)


@dataclass(frozen=True)
class KeyBias(Shift):
    """b_k → b_k + δ: one number more on all logits of a query, which softmax ignores; of rows that
    are not rotated."""

    block: AttentionBlock

    kind: ClassVar[str] = "key-bias"

    def draw(self, rng: torch.Generator) -> Element:
        drawn = normal((self.block.kv_heads * self.block.head_dim,), rng, 0.5)
        return (self._free(drawn),)

    def move(self, state: State, element: Element) -> None:
        for slot in self.block.biases("k"):
            add_to(slot, state, element[0])

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        return (self._free(-vector(self.block.biases("k")[0], state)),)

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        slots = self.block.biases("k")
        changes = [vector(slot, anchor) - vector(slot, state) for slot in slots]
        return (self._free(torch.stack(changes).mean(0)),)

    def _free(self, value: Tensor) -> Tensor:
        """Zero in the other rows."""
        return value * self.block.free_rows.to(value.device).repeat(self.block.kv_heads)
