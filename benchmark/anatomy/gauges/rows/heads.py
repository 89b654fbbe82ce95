"""What reads the last norm of a tower: a head, the embeddings, or a layer that these read."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from benchmark.anatomy.blocks import Axis, Linear
from benchmark.anatomy.gauges.rows.names import Names
from benchmark.anatomy.gauges.rows.row import Row, Transform
from benchmark.anatomy.gauges.wiring import Norm, Segment


@dataclass(frozen=True)
class Head:
    """What the last norm is read by.

    Attributes:
        readers: linear maps; ``plain``: whether their outputs are the model's own.
        tied: embeddings that are the output matrix too, under all their names.
        after: the norm that a tied output reads, where that is not the tower's last.
        within: segments on the axis of the stream, behind ``readers``.
        beside: segments on an axis of their own.
    """

    readers: tuple[Linear, ...] = ()
    plain: bool = False
    tied: tuple[Axis, ...] = ()
    after: Norm | None = None
    within: tuple[Segment, ...] = ()
    beside: tuple[Segment, ...] = ()


def head_of(names: Names, row: Row, root: str, embeddings: Collection[Axis], width: int) -> Head:
    """What the rows say, nothing where they know none of it."""
    for owner, head, rest in row.heads:
        if not root.endswith(owner):
            continue
        at = root.removesuffix(owner)
        if not rest and names.known(f"{at}{head}.weight"):
            tied = names.axes(f"{at}{head}.weight")
            if set(tied) & set(embeddings):
                names.used.add(f"{at}{head}.bias")
                return Head(tied=tied)
        following = [k for k in names.state if rest and re.fullmatch(re.escape(at) + rest, k)]
        linear = names.linear(at + head)
        if linear is None or linear.weight.read(names.state).shape[1] != width:
            continue
        if rest and not following:
            continue
        names.used.update(following)
        return Head(readers=(linear,), plain=True)
    for transform in row.transforms:
        if root.endswith(transform.owner):
            found = _transformed(names, transform, root, embeddings)
            if found is not None:
                return found
    return Head()


def _transformed(
    names: Names, row: Transform, root: str, embeddings: Collection[Axis]
) -> Head | None:
    """A layer, its activation, a norm, and the output: what masked tokens are told by."""
    at = root.removesuffix(row.owner)
    dense, norm = names.linear(at + row.dense), names.plain_norm(at + row.norm)
    if dense is None or norm is None or not names.known(f"{at}{row.output}.weight"):
        return None
    names.used.update(key for key in names.state if re.fullmatch(re.escape(at) + row.rest, key))
    output, outputs = names.linear(at + row.output), names.axes(f"{at}{row.output}.weight")
    tied = outputs if set(outputs) & set(embeddings) else ()
    names.used.add(f"{at}{row.output}.bias")
    width = len(dense.weight.read(names.state))
    made = Segment(
        f"{norm.name}.input",
        width,
        activated=tuple(Axis(slot, 0) for slot in dense.slots()),
        norms=(norm,),
    )
    readers = () if tied or output is None else (output,)
    given = Segment(norm.name, width, sources=(norm,), readers=readers, head=not tied, tied=tied)
    within, beside = ((made, given), ()) if tied else ((), (made, given))
    return Head((dense,), tied=tied, after=norm, within=within, beside=beside)
