"""The streams of a model, from the names of its tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from benchmark.anatomy.blocks import Linear
from benchmark.anatomy.families import FAMILIES, Family
from benchmark.anatomy.gauges.convolutional import convolutional
from benchmark.anatomy.gauges.rows import ROWS
from benchmark.anatomy.gauges.rows.crossing import t5
from benchmark.anatomy.gauges.rows.names import (
    Layer,
    Names,
    Side,
    head_of,
    roots_of,
    sides_of,
    together_of,
)
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.wiring import (
    Norm,
    Segment,
    Stream,
    Wiring,
)
from benchmark.anatomy.whole import Anatomy

#: What reads nothing of a stream and writes nothing into it.
_BESIDE = re.compile(r".*(relative_attention_bias\.weight|logit_scale|logit_bias|\.inv_freq)")


def wiring(anatomy: Anatomy, state: Mapping[str, Tensor]) -> Wiring:
    """The streams and batch norms of a model, from the names of ``state``."""
    names = Names(state)
    for block in anatomy.attention:
        for linear in block.linears().values():
            names.used.update(slot.key for slot in linear.slots())
        names.used.update(slot.key for slot in block.qk_norm or ())
    for units in anatomy.units:
        names.used.update(axis.slot.key for axis in units.axes)
    for mlp in anatomy.mlp:
        names.used.update(slot.key for slot in mlp.down.slots())
    inside = set(names.used)
    families = {family.name: family for family in FAMILIES}
    present = [families[name] for name in anatomy.family.split("+") if name in families]
    towers: list[tuple[str, Stream]] = list(t5(names, anatomy, present))
    for family in present:
        for root, layers in roots_of(family, anatomy, state).items():
            row = _row(family, layers, state)
            if row is not None:
                at = root.removesuffix(row.inside)
                if any(at + need in state for need in row.needs):
                    towers.append((at, _tower(names, row, at, layers)))
    streams, batch_norms, elsewhere = convolutional(anatomy, state)
    left = [
        key
        for key, value in state.items()
        if value.is_floating_point()
        and key not in names.used
        and not _BESIDE.fullmatch(key)
        and not key.startswith(elsewhere)
    ]
    # What lies in no tower may read any of them: a block without a row of its own, too.
    roots = (*(root for root, _ in towers), *elsewhere)
    outside = [key for key in state if (key in inside or key in left) and not key.startswith(roots)]
    sound, uncovered = [], []
    for root, stream in towers:
        strange = [key for key in left if key.startswith(root)] or outside
        if strange:
            uncovered.append(
                f"gauges outside the blocks of {stream.name}: no row knows {strange[0]!r}"
            )
        else:
            sound.append(stream)
    wired = {r.weight.key for _, stream in towers for s in stream.segments for r in s.readers}
    uncovered += [
        f"gauges outside the block {key!r}: no row says which norm it reads"
        for key in dict.fromkeys(block.q.weight.key for block in anatomy.attention)
        if key not in wired
    ]
    return Wiring((*sound, *streams), batch_norms, tuple(names.qk_gains), tuple(uncovered))


def _row(family: Family, layers: Sequence[Layer], state: Mapping[str, Tensor]) -> Row | None:
    """The row whose norms every layer has."""
    for row in ROWS:
        wanted = [*(row.norms or ()), *(row.behind or ())]
        if family.name in row.families and all(
            f"{layer.name}{norm}.weight" in state for layer in layers for norm in wanted
        ):
            return row
    return None


def _tower(names: Names, row: Row, root: str, layers: Sequence[Layer]) -> Stream:
    state = names.state
    embeddings = tuple(names.axis(root + key) for key in row.embeddings if root + key in state)
    first = [names.norm(root + n, row) for n in row.first if f"{root}{n}.weight" in state]
    last = [names.norm(root + n, row) for n in row.last if f"{root}{n}.weight" in state]
    norms = [
        tuple(names.norm(layer.name + norm, row) for norm in row.norms or ()) for layer in layers
    ]
    width = layers[0].attention.q.weight.read(state).shape[1]
    sides = [side for layer in layers for side in sides_of(names, row, layer)]
    head, tied = head_of(names, row, root, embeddings, width)
    if row.beside:
        names.used.update(key for key in state if re.fullmatch(re.escape(root) + row.beside, key))
    parts = _Parts(
        root,
        width,
        entry=Segment(
            f"{root}embeddings",
            width,
            embeddings=tuple(dict.fromkeys((*embeddings, *tied))),
            norms=tuple(first),
            together=tuple(together_of(row, root, names)),
            tied=tied,
            after_tied=tuple(last) if tied else (),
        ),
        first=first[0] if first else None,
        norms=tuple(norms),
        sides=tuple(sides),
        last=last[0] if last else norms[-1][-1],
        end=Segment(
            "", width, readers=head, head=bool(head), open=not head and not tied, tied=tied
        ),
    )
    mlps = tuple(layer.mlp for layer in layers if layer.mlp is not None)
    return Stream(root or "model", tuple((_post if row.post else _pre)(parts)), mlps)


@dataclass(frozen=True)
class _Parts:
    """What a tower is made of, before it is cut into segments."""

    root: str
    width: int
    entry: Segment
    first: Norm | None
    norms: tuple[tuple[Norm, ...], ...]
    sides: tuple[Side, ...]
    last: Norm
    end: Segment

    def behind(self) -> Iterator[Norm]:
        """The norms between the writers and the stream."""
        return (side.behind for side in self.sides if side.behind is not None)


def _pre(parts: _Parts) -> Iterator[Segment]:
    """Norms before attention and MLP: one long segment, and one behind each norm."""
    main, mains = Segment(f"{parts.root}stream", parts.width), list(parts.behind())
    if parts.first is not None:
        yield parts.entry
        mains.insert(0, parts.first)
    norms = [norm for pair in parts.norms for norm in pair]
    readers: dict[Norm, list[Linear]] = {}
    for norm, side in zip(norms, parts.sides, strict=bool(norms)):
        readers.setdefault(norm, []).extend(side.readers)
    yield replace(
        main if parts.first is not None else parts.entry,
        name=main.name,
        sources=tuple(mains),
        writers=tuple(side.writer for side in parts.sides if side.behind is None),
        readers=() if norms else tuple(r for side in parts.sides for r in side.readers),
        norms=(*readers, parts.last),
    )
    for side in parts.sides:
        if side.behind is not None:
            name = side.writer.linear.weight.key
            yield Segment(name, parts.width, writers=(side.writer,), norms=(side.behind,))
    for norm, linears in readers.items():
        yield Segment(norm.name, parts.width, sources=(norm,), readers=tuple(linears))
    yield replace(parts.end, name=parts.last.name, sources=(parts.last,))


def _post(parts: _Parts) -> Iterator[Segment]:
    """Norms behind the sums: a segment between each two."""
    assert parts.first is not None
    yield parts.entry
    norms = [parts.first, *(norm for pair in parts.norms for norm in pair)]
    for norm, following, side in zip(norms, norms[1:], parts.sides, strict=False):
        yield Segment(
            norm.name,
            parts.width,
            sources=(norm,),
            readers=side.readers,
            writers=(side.writer,),
            norms=(following,),
        )
    yield replace(parts.end, name=norms[-1].name, sources=(norms[-1],))
