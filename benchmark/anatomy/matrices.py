"""A State as matrices: every Linear of a block with its bias, and every other tensor on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.anatomy.blocks import Linear, Slot
from benchmark.anatomy.whole import Anatomy
from benchmark.core.state import State


@dataclass(frozen=True)
class Matrix:
    """Slots with the same output units side by side: W, or [W | b], as one matrix (n, m).

    What a defense adds to a weight and takes away again in the bias is of low rank in [W | b] only.
    Vectors are matrices of one column; kernels are flattened.
    """

    slots: tuple[Slot, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """(n, m) float64."""
        return torch.cat([_flat(slot.read(state)).double() for slot in self.slots], dim=1)

    def write(self, state: State, value: Tensor) -> None:
        """The inverse of :meth:`read`; edits ``state``, a shallow copy."""
        olds = [slot.read(state) for slot in self.slots]
        parts = value.split([_flat(old).shape[1] for old in olds], dim=1)
        for slot, old, part in zip(self.slots, olds, parts, strict=True):
            slot.write(state, part.reshape(old.shape))


def matrices(state: Mapping[str, Tensor], anatomy: Anatomy) -> list[Matrix]:
    """Every floating-point number of ``state`` in one of these."""
    found = [Matrix(tuple(linear.slots())) for linear in _linears(anatomy)]
    inside = {slot.key for matrix in found for slot in matrix.slots}
    alone = [k for k, v in state.items() if v.is_floating_point() and k not in inside]
    return found + [Matrix((Slot(key),)) for key in alone]


def _linears(anatomy: Anatomy) -> Iterator[Linear]:
    for attention in anatomy.attention:
        yield from attention.linears().values()
    for mlp in anatomy.mlp:
        yield from (linear for linear in (mlp.up, mlp.gate, mlp.down) if linear is not None)


def _flat(value: Tensor) -> Tensor:
    """Output units first: (n, m)."""
    return value.reshape(len(value) if value.ndim else 1, -1)
