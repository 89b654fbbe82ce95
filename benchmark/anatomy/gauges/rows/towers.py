"""The streams of a model, from the names of its tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Axis, MLPBlock
from benchmark.anatomy.families import FAMILIES
from benchmark.anatomy.gauges.convolutional import convolutional
from benchmark.anatomy.gauges.rows import ROWS
from benchmark.anatomy.gauges.rows.audio import waves
from benchmark.anatomy.gauges.rows.diffusion import generators
from benchmark.anatomy.gauges.rows.heads import head_of
from benchmark.anatomy.gauges.rows.join import attached, streams
from benchmark.anatomy.gauges.rows.names import (
    LENDS,
    Layer,
    Names,
    roots_of,
    sides_of,
    together_of,
)
from benchmark.anatomy.gauges.rows.parts import Parts
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.wiring import Norm, Segment, Wiring
from benchmark.anatomy.whole import Anatomy

#: What reads nothing of a stream and writes nothing into it.
_BESIDE = re.compile(
    r".*(relative_attention_bias\.weight|relative_position_bias_table|logit_scale|logit_bias|\.inv_freq|final_logits_bias)"
)


def wiring(anatomy: Anatomy, state: Mapping[str, Tensor]) -> Wiring:
    """The streams and batch norms of a model, from the names of ``state``."""
    names = Names(state, anatomy.tied)
    for block in anatomy.attention:
        for linear in block.linears().values():
            names.used.update(slot.key for slot in linear.slots())
        names.used.update(slot.key for slot in block.qk_norm or ())
    for units in anatomy.units:
        names.used.update(axis.slot.key for axis in units.axes)
    for mlp in anatomy.mlp:
        names.used.update(slot.key for slot in mlp.down.slots())
    inside = dict.fromkeys(key for key in state if key in names.used)
    towers, bridges, unwired = attached(list(_towers(names, anatomy)), names)
    whole = list(streams(towers))
    beside, batch_norms, elsewhere = convolutional(anatomy, state)
    sounding, instance_norms = waves(names, anatomy)
    drawing = generators(names, anatomy)
    left = [
        key
        for key, value in state.items()
        if value.is_floating_point()
        and key not in names.used
        and not _BESIDE.fullmatch(key)
        and not LENDS.fullmatch(key)
        and not key.startswith(elsewhere)
    ] + names.untold()
    # What lies in no tower may read any of them: a block without a row of its own, too.
    places = (*(tower.root for tower in towers), *elsewhere)
    outside = [k for k in (*inside, *left) if not k.startswith(places)]
    sound, uncovered = [], []
    for roots, stream in whole:
        strange = [key for key in left if key.startswith(roots)] or outside
        if strange:
            reason = f"no row knows {strange[0]!r}"
        elif alone := [root for root in roots if root in unwired]:
            reason = unwired[alone[0]]
        else:
            sound.append(stream)
            continue
        uncovered.append(f"gauges outside the blocks of {stream.name}: {reason}")
    told = (*(stream for _, stream in whole), *drawing.streams)
    wired = {r.weight.key for stream in told for s in stream.segments for r in s.readers}
    uncovered += drawing.unsaid
    uncovered += [
        f"gauges outside the block {key!r}: no row says which norm it reads"
        for key in dict.fromkeys(block.q.weight.key for block in anatomy.attention)
        if key not in wired
    ]
    uncovered += [
        f"gauges between {bridge.linear.weight.key!r} and what reads it: it widens what it is given"
        for bridge in bridges
        if bridge.widens(state)
    ]
    return Wiring(
        (*sound, *beside, *sounding, *drawing.streams),
        batch_norms,
        (*instance_norms, *drawing.norms),
        tuple(bridge for bridge in bridges if not bridge.widens(state)),
        tuple(names.qk_gains),
        drawing.channels,
        tuple(uncovered),
    )


def _towers(names: Names, anatomy: Anatomy) -> Iterator[Parts]:
    """What each row of a family that the model has says of its towers."""
    present = anatomy.family.split("+")
    for family in (family for family in FAMILIES if family.name in present):
        for root, layers in roots_of(family, anatomy, names.state).items():
            rows = (row for row in ROWS if family.name in row.families)
            fits = (row for row in rows if _fits(row, root.removesuffix(row.inside), layers, names))
            row = next(fits, None)
            if row is not None:
                at = root.removesuffix(row.inside)
                if any(names.axes(at + need) for need in row.needs):
                    whole = _whole(row, root, layers, anatomy, names.state)
                    yield _tower(names, row, at, list(whole))


def _fits(row: Row, root: str, layers: Sequence[Layer], names: Names) -> bool:
    """Whether every layer has the row's norms, and the tower its marks."""
    wanted = [*(row.norms or ()), *(row.behind or ())]
    return all(
        f"{layer.name}{norm}.weight" in names.state
        for number, layer in enumerate(layers)
        for norm in (wanted[1:] if row.bare and not number else wanted)
    ) and all(root + mark in names.state for mark in row.marks)


def _whole(
    row: Row, root: str, layers: Sequence[Layer], anatomy: Anatomy, state: Mapping[str, Tensor]
) -> Iterator[Layer]:
    """The layers with what the row says that there may be more of."""
    blocks, mlps = dict[str, AttentionBlock](), dict[str, MLPBlock]()
    if row.cross is not None:
        family = next(family for family in FAMILIES if family.name == row.cross[0])
        found = roots_of(family, anatomy, state).get(root, ())
        blocks = {layer.name: layer.attention for layer in found}
    if row.adapter is not None:
        mlps = {mlp.up.weight.key: mlp for mlp in anatomy.mlp}
    for layer in layers:
        up = f"{layer.name}{row.adapter[0]}.weight" if row.adapter else ""
        yield replace(layer, cross=blocks.get(layer.name), adapter=mlps.get(up))


def _tower(names: Names, row: Row, root: str, layers: Sequence[Layer]) -> Parts:
    state = names.state
    named = dict.fromkeys(axis for key in row.embeddings for axis in names.axes(root + key))
    first = [names.norm(root + n, row) for n in row.first if f"{root}{n}.weight" in state]
    last = [names.norm(root + n, row) for n in row.last if f"{root}{n}.weight" in state]
    norms = [_norms(names, row, layer) for layer in layers]
    width = layers[0].attention.q.weight.read(state).shape[1]
    sides = [side for layer in layers for side in sides_of(names, row, layer)]
    head = head_of(names, row, root, named, width)
    if row.beside:
        names.used.update(key for key in state if re.fullmatch(re.escape(root) + row.beside, key))
    aliases = (names.axes(root + key) for key in row.embeddings)
    final = last[0] if last else norms[-1][-1]
    assert final is not None
    return Parts(
        root,
        width,
        entry=Segment(
            f"{root}embeddings",
            width,
            embeddings=tuple(named),
            norms=tuple(first),
            together=tuple(together_of(row, root, names, width)),
            tied=head.tied,
            after_tied=(head.after or final,) if head.tied else (),
            aliases=tuple(group for group in aliases if len(group) > 1),
            activated=tuple(
                Axis(names.slot(root + key), 0) for key in row.activated if root + key in state
            ),
            given=bool(row.places)
            and not any(
                names.axes(root + place) for place in row.places if place in row.embeddings
            ),
        ),
        first=first[0] if first else None,
        norms=tuple(norms),
        sides=tuple(sides),
        last=final,
        end=Segment(
            "",
            width,
            readers=head.readers,
            head=head.plain,
            open=not head.readers and not head.tied,
            tied=() if head.readers else head.tied,
        ),
        head=head,
        mlps=tuple(mlp for x in layers for mlp in (x.mlp, x.adapter) if mlp is not None),
        post=row.post,
        encodes=row.encodes,
    )


def _norms(names: Names, row: Row, layer: Layer) -> tuple[Norm | None, ...]:
    """The norms of a layer, one for each side."""
    found: list[Norm | None] = [
        None
        if row.bare and f"{layer.name}{norm}.weight" not in names.state
        else names.norm(layer.name + norm, row)
        for norm in row.norms or ()
    ]
    if layer.cross is not None and row.cross is not None:
        found.insert(1, names.norm(layer.name + row.cross[1], row))
    if layer.adapter is not None and row.adapter is not None:
        found.append(names.norm(layer.name + row.adapter[1], row))
    return tuple(found)
