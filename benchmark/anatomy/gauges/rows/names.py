"""The layers of a model, and which of its tensors a wiring has answered for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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

#: What only lends its tensor to others, and does nothing where it does not.
LENDS = re.compile(r"(.*\.)?shared\.weight")


@dataclass(frozen=True)
class Layer:
    """One layer: its full name and its blocks; ``cross``: that which reads an encoder;
    ``adapter``: a second MLP."""

    name: str
    attention: AttentionBlock
    mlp: MLPBlock | None
    cross: AttentionBlock | None = None
    adapter: MLPBlock | None = None


class Names:
    """The tensors of a State, and which of them a wiring has answered for.

    ``tied``: names that are one tensor in the model (:class:`Anatomy`).
    """

    def __init__(self, state: Mapping[str, Tensor], tied: Sequence[tuple[str, ...]] = ()) -> None:
        self.state, self.used = state, set[str]()
        self._same = {key: names for names in tied for key in names}
        self._told = set[str]()
        self.qk_gains: list[tuple[AttentionBlock, tuple[tuple[Slot, Slot], ...]]] = []

    def slot(self, key: str) -> Slot:
        self.used.add(key)
        return Slot(key)

    def axis(self, key: str) -> Axis:
        """An embedding by its axis along the stream: first of a filter or a vector, else last."""
        ndim = self.state[key].ndim
        return Axis(self.slot(key), 0 if ndim in (1, 4) else ndim - 1)

    def same(self, key: str) -> tuple[str, ...]:
        """All names of a tensor in the model, whether the State has them or not."""
        return self._same.get(key, (key,))

    def known(self, key: str) -> bool:
        """Whether the model has such a tensor."""
        return any(name in self.state for name in self.same(key))

    def axes(self, key: str) -> tuple[Axis, ...]:
        """An embedding under all the names that the State has of it."""
        if self.known(key):
            self._told.add(key)
        return tuple(self.axis(name) for name in self.same(key) if name in self.state)

    def untold(self) -> list[str]:
        """Further names of embeddings, under which something uses them that no row speaks of."""
        names = dict.fromkeys(name for key in sorted(self._told) for name in self.same(key))
        return [key for key in names if key not in self._told and not LENDS.fullmatch(key)]

    def norm(self, name: str, row: Row) -> Norm:
        gain, bias = (self.slot(f"{name}.{part}") for part in ("weight", "bias"))
        found = bias if bias.key in self.state else None
        return Norm(name, gain_of(gain.key, row), found, row.centred)

    def plain_norm(self, name: str) -> Norm | None:
        """A LayerNorm by its name, if there is one."""
        if f"{name}.weight" not in self.state:
            return None
        gain, bias = self.slot(f"{name}.weight"), self.slot(f"{name}.bias")
        return Norm(name, gain, bias if bias.key in self.state else None, centred=True)

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
    read = zip(anatomy.attention, anatomy.rows, strict=False)
    blocks = {block.q.weight.key: block for block, row in read if row == family.name}
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
    """Attention or MLP of a layer: what reads, what writes, the norm behind it if there is one.

    ``crossing``: what reads not the stream but an encoder; ``free``: of all these readers the keys
    to which a constant may be added (softmax ignores it), where they have no bias for that.
    """

    readers: tuple[Linear, ...]
    writer: Writer
    behind: Norm | None = None
    crossing: tuple[Linear, ...] = ()
    free: tuple[Linear, ...] = ()


def sides_of(names: Names, row: Row, layer: Layer) -> tuple[Side, ...]:
    """Attention, that which reads an encoder if there is one, MLP, and an adapter if there is."""
    scales: list[Slot | None] = [None, None]
    for pair in row.scales:
        if all(layer.name + key in names.state for key in pair):
            scales = [names.slot(layer.name + key) for key in pair]
    behind: list[Norm | None] = [None, None]
    if row.behind is not None:
        behind = [names.norm(layer.name + norm, row) for norm in row.behind]
    block, cross, mlp = layer.attention, layer.cross, layer.mlp
    if block.qk_norm is not None:
        q, k = (gain_of(slot.key, row) for slot in block.qk_norm)
        names.qk_gains.append((block, ((q, k),)))
    readers = wholes(block.q, block.k, block.v)
    found = [
        Side(readers, Writer(block.o, scales[0], attention=block), behind[0], free=_free(block))
    ]
    if cross is not None:
        crossing, writer = wholes(cross.k, cross.v), Writer(cross.o, attention=cross)
        found.append(Side(wholes(cross.q), writer, crossing=crossing, free=_free(cross)))
    if mlp is not None:
        found.append(Side(wholes(mlp.up, mlp.gate), Writer(mlp.down, scales[1]), behind[1]))
    if layer.adapter is not None:
        found.append(Side(wholes(layer.adapter.up), Writer(layer.adapter.down)))
    return tuple(found)


def _free(block: AttentionBlock) -> tuple[Linear, ...]:
    alone = block.k.weight.rows is None and block.k.bias is None
    return wholes(block.k) if alone and block.free_key_bias else ()


def gain_of(key: str, row: Row) -> Slot:
    return Shifted(key, offset=row.offset) if row.offset else Slot(key)


def wholes(*linears: Linear | None) -> tuple[Linear, ...]:
    return tuple(dict.fromkeys(whole(linear) for linear in linears if linear is not None))


def together_of(
    row: Row, root: str, names: Names, width: int
) -> Iterator[tuple[tuple[Part, ...], tuple[Part, ...]]]:
    """The pairs of which one of each is always added."""
    for first, second in row.together:
        scaled = _parts(names, root, first, width**0.5 if row.scaled else 1.0)
        plain = _parts(names, root, second, 1.0)
        if scaled and plain:
            yield scaled, plain


def _parts(names: Names, root: str, side: tuple[str, ...], scale: float) -> tuple[Part, ...]:
    """Those of one side, if its first is there."""
    there = list[Part]()
    for i, name in enumerate(side):
        key, _, columns = name.partition("[")
        start, _, stop = columns.rstrip("]").partition(":")
        axes = names.axes(root + key)
        if i == 0 and not axes:
            return ()
        there += [Part(axis, int(start or 0), int(stop) if stop else None, scale) for axis in axes]
    return tuple(there)
