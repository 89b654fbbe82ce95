"""The layers of a model, and which of its tensors a wiring has answered for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Axis, Linear, MLPBlock, Slot
from benchmark.anatomy.families import Family
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.wiring import (
    Norm,
    Part,
    Shifted,
    Writer,
    whole,
)
from benchmark.anatomy.whole import Anatomy


@dataclass(frozen=True)
class Layer:
    """One layer: its full name and its blocks."""

    name: str
    attention: AttentionBlock
    mlp: MLPBlock | None


class Names:
    """The tensors of a State, and which of them a wiring has answered for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.used = state, set[str]()
        self.qk_gains: list[tuple[AttentionBlock, tuple[Slot, Slot]]] = []

    def slot(self, key: str) -> Slot:
        self.used.add(key)
        return Slot(key)

    def axis(self, key: str) -> Axis:
        """An embedding by its axis along the stream: first of a filter or a vector, else last."""
        ndim = self.state[key].ndim
        return Axis(self.slot(key), 0 if ndim in (1, 4) else ndim - 1)

    def norm(self, name: str, row: Row) -> Norm:
        gain, bias = (self.slot(f"{name}.{part}") for part in ("weight", "bias"))
        found = bias if bias.key in self.state else None
        return Norm(name, gain_of(gain.key, row), found, row.centred)

    def linear(self, name: str) -> Linear | None:
        """A layer by its name; a bare (in, out) matrix by its own."""
        if name in self.state:
            return Linear(replace(self.slot(name), transposed=True))
        if f"{name}.weight" not in self.state:
            return None
        bias = self.slot(f"{name}.bias")
        return Linear(self.slot(f"{name}.weight"), bias if bias.key in self.state else None)


def roots_of(
    family: Family, anatomy: Anatomy, state: Mapping[str, Tensor]
) -> dict[str, list[Layer]]:
    """The layers of each tower of a family, in order, by what stands before them."""
    blocks = {block.q.weight.key: block for block in anatomy.attention}
    mlps = {mlp.up.weight.key: mlp for mlp in anatomy.mlp}
    found: dict[str, list[Layer]] = {}
    ends = re.compile(re.escape(family.layer).replace(r"\{\}", r"\d+") + r"\.")
    for name in family.layers(state):
        block = blocks.get(f"{name}{family.q}{family.join}weight")
        end = ends.search(name)
        if block is not None and end is not None:
            layer = Layer(name, block, mlps.get(f"{name}{family.up}.weight"))
            found.setdefault(name[: end.start()], []).append(layer)
    return found


@dataclass(frozen=True)
class Side:
    """Attention or MLP of a layer: what reads, what writes, the norm behind it if there is one."""

    readers: tuple[Linear, ...]
    writer: Writer
    behind: Norm | None


def sides_of(names: Names, row: Row, layer: Layer) -> tuple[Side, ...]:
    scales: list[Slot | None] = [None, None]
    for pair in row.scales:
        if all(layer.name + key in names.state for key in pair):
            scales = [names.slot(layer.name + key) for key in pair]
    behind: list[Norm | None] = [None, None]
    if row.behind is not None:
        behind = [names.norm(layer.name + norm, row) for norm in row.behind]
    block, mlp = layer.attention, layer.mlp
    if block.qk_norm is not None:
        q, k = (gain_of(slot.key, row) for slot in block.qk_norm)
        names.qk_gains.append((block, (q, k)))
    found = [Side(wholes(block.q, block.k, block.v), Writer(block.o, scales[0], block), behind[0])]
    if mlp is not None:
        found.append(Side(wholes(mlp.up, mlp.gate), Writer(mlp.down, scales[1]), behind[1]))
    return tuple(found)


def gain_of(key: str, row: Row) -> Slot:
    return Shifted(key, offset=row.offset) if row.offset else Slot(key)


def wholes(*linears: Linear | None) -> tuple[Linear, ...]:
    return tuple(dict.fromkeys(whole(linear) for linear in linears if linear is not None))


def head_of(
    names: Names, row: Row, root: str, embeddings: tuple[Axis, ...], width: int
) -> tuple[tuple[Linear, ...], tuple[Axis, ...]]:
    """What reads the last norm, or which embeddings do."""
    for owner, head, rest in row.heads:
        if not root.endswith(owner):
            continue
        at = root.removesuffix(owner)
        following = [k for k in names.state if rest and re.fullmatch(re.escape(at) + rest, k)]
        linear = names.linear(at + head)
        if linear is None or linear.weight.read(names.state).shape[1] != width:
            continue
        if rest and not following:
            continue
        names.used.update(following)
        weight = linear.weight.read(names.state)
        for axis in embeddings:
            other = axis.slot.read(names.state)
            if other.shape == weight.shape and torch.equal(other, weight):
                return (), (axis, Axis(linear.weight, 1))
        return (linear,), ()
    return (), ()


def together_of(
    row: Row, root: str, names: Names
) -> Iterator[tuple[tuple[Part, ...], tuple[Part, ...]]]:
    for sides in row.together:
        parts = []
        for side in sides:
            there = []
            for i, name in enumerate(side):
                key, _, columns = name.partition("[")
                if root + key in names.state:
                    start, _, stop = columns.rstrip("]").partition(":")
                    there.append(
                        Part(
                            names.axis(root + key),
                            int(start or 0),
                            int(stop) if stop else None,
                        )
                    )
                elif i == 0:
                    break
            parts.append(tuple(there))
        if all(parts):
            yield parts[0], parts[1]
