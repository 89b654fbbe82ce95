"""What a tower is made of, and the segments it is cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmark.anatomy.blocks import Linear, MLPBlock
from benchmark.anatomy.gauges.rows.heads import Head
from benchmark.anatomy.gauges.rows.names import Side
from benchmark.anatomy.gauges.wiring import Norm, Segment


@dataclass(frozen=True)
class Parts:
    """A tower before it is cut into segments.

    Attributes:
        root: what its names start with; ``width``: of its stream.
        entry: where the embeddings come in.
        first: the norm between these and the first layer, if there is one.
        norms: of each layer, one before each side (``post``: behind), or none; None for a side that
            reads the stream itself.
        last: the last norm; ``end``: the segment that it gives, which ``head`` reads.
        encodes: whether a decoder that reads the tower reads what that norm gives.
    """

    root: str
    width: int
    entry: Segment
    first: Norm | None
    norms: tuple[tuple[Norm | None, ...], ...]
    sides: tuple[Side, ...]
    last: Norm
    end: Segment
    head: Head
    mlps: tuple[MLPBlock, ...]
    post: bool
    encodes: bool

    @property
    def crossing(self) -> tuple[Linear, ...]:
        """What of it reads an encoder."""
        return tuple(reader for side in self.sides for reader in side.crossing)

    @property
    def free(self) -> tuple[Linear, ...]:
        """Keys that need no bias."""
        return tuple(reader for side in self.sides for reader in side.free)

    def behind(self) -> Iterator[Norm]:
        """The norms between the writers and the stream."""
        return (side.behind for side in self.sides if side.behind is not None)

    def segments(self) -> list[Segment]:
        """Those of the stream, the one with the embeddings first."""
        return [*(_post(self) if self.post else _pre(self)), *self.head.within]


def _pre(parts: Parts) -> Iterator[Segment]:
    """Norms before attention and MLP: one long segment, and one behind each norm."""
    main, mains = Segment(f"{parts.root}stream", parts.width), list(parts.behind())
    if parts.first is not None:
        yield parts.entry
        mains.insert(0, parts.first)
    norms = [norm for pair in parts.norms for norm in pair] or [None] * len(parts.sides)
    readers: dict[Norm, list[Linear]] = {}
    bare: list[Linear] = []
    for norm, side in zip(norms, parts.sides, strict=True):
        (bare if norm is None else readers.setdefault(norm, [])).extend(side.readers)
    yield replace(
        main if parts.first is not None else parts.entry,
        name=main.name,
        sources=tuple(mains),
        writers=tuple(side.writer for side in parts.sides if side.behind is None),
        readers=tuple(bare),
        norms=(*readers, parts.last),
    )
    for side in parts.sides:
        if side.behind is not None:
            name = side.writer.linear.weight.key
            yield Segment(name, parts.width, writers=(side.writer,), norms=(side.behind,))
    for norm, linears in readers.items():
        yield Segment(
            norm.name, parts.width, sources=(norm,), readers=tuple(linears), free=parts.free
        )
    yield replace(parts.end, name=parts.last.name, sources=(parts.last,))


def _post(parts: Parts) -> Iterator[Segment]:
    """Norms behind the sums: a segment between each two."""
    norms = [norm for pair in parts.norms for norm in pair if norm is not None]
    source, entry = parts.first, parts.entry
    if source is not None:
        yield entry
        entry = Segment(source.name, parts.width, sources=(source,))
    for norm, side in zip(norms, parts.sides, strict=True):
        yield replace(
            entry, readers=side.readers, writers=(side.writer,), norms=(norm,), free=parts.free
        )
        entry = Segment(norm.name, parts.width, sources=(norm,))
    yield replace(parts.end, name=norms[-1].name, sources=(norms[-1],))
