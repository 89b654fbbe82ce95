"""Towers of which one reads another: the encoder's end is what the decoder's keys and values read.

Where both share their embedding, their streams are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from benchmark.anatomy.gauges.rows.names import Names
from benchmark.anatomy.gauges.rows.parts import Parts
from benchmark.anatomy.gauges.wiring import Bridge, Part, Segment, Stream

#: What makes an encoder as wide as the decoder that reads it.
_BRIDGE = re.compile(r"((?:.*\.)?)enc_to_dec_proj\.weight")


class Attached(NamedTuple):
    """The towers, the encoder's end closed by what reads it, and what stands between.

    ``unwired``: which towers cannot be wired, and why.
    """

    towers: list[Parts]
    bridges: tuple[Bridge, ...] = ()
    unwired: Mapping[str, str] = {}


def attached(towers: Sequence[Parts], names: Names) -> Attached:
    """Towers of which at most one is an encoder."""
    readers = [tower for tower in towers if tower.crossing]
    encoders = [tower for tower in towers if not tower.crossing]
    if not readers:
        return Attached(list(towers))
    reason = ""
    if not encoders:
        reason = "no tower is what its cross-attention reads"
    elif len(encoders) > 1:
        reason = f"its cross-attention may read any of {len(encoders)} towers"
    elif not encoders[0].encodes:
        reason = "what its cross-attention reads of the encoder is not known"
    if reason:
        # They may read a tower anywhere, before its last norm too: none can be wired.
        return Attached(list(towers), unwired={tower.root: reason for tower in towers})
    (encoder,) = encoders
    crossing = tuple(chain.from_iterable(tower.crossing for tower in readers))
    free = tuple(chain.from_iterable(tower.free for tower in readers))
    bridges = list[Bridge]()
    for found in filter(None, map(_BRIDGE.fullmatch, names.state)):
        linear = names.linear(f"{found[1]}enc_to_dec_proj")
        if linear is not None:
            bridges.append(Bridge(linear, crossing))
            crossing, free = (linear,), ()
    end = replace(encoder.end, readers=crossing, free=free, open=False)
    return Attached([replace(encoder, end=end), *readers], tuple(bridges))


def streams(towers: Iterable[Parts]) -> Iterator[tuple[tuple[str, ...], Stream]]:
    """The streams, and the roots of the towers that each is made of."""
    groups: list[list[Parts]] = []
    for tower in towers:
        own = set(tower.entry.embeddings)
        group = next((g for g in groups if any(own & set(t.entry.embeddings) for t in g)), None)
        if group is None:
            groups.append([tower])
        else:
            group.append(tower)
    for group in groups:
        cut = [tower.segments() for tower in group]
        entry = _merged([segments[0] for segments in cut])
        rest = chain.from_iterable(segments[1:] for segments in cut)
        roots = tuple(tower.root for tower in group)
        mlps = tuple(chain.from_iterable(tower.mlps for tower in group))
        yield roots, Stream("+".join(roots) or "model", (entry, *rest), mlps)
        for tower in group:
            if tower.head.beside:
                yield roots, Stream(tower.head.beside[-1].name, tower.head.beside)


def _merged(entries: Sequence[Segment]) -> Segment:
    """Where the embeddings of all come in."""
    if len(entries) == 1:
        return entries[0]

    def all_of(name: str) -> tuple[object, ...]:
        return tuple(dict.fromkeys(chain.from_iterable(getattr(e, name) for e in entries)))

    fields = ("sources", "embeddings", "writers", "readers", "norms", "tied", "after_tied")
    first, second = (
        tuple(dict.fromkeys(chain.from_iterable(pair[i] for e in entries for pair in e.together)))
        for i in (0, 1)
    )
    together: tuple[tuple[tuple[Part, ...], tuple[Part, ...]], ...] = ()
    if all(len(entry.together) == 1 for entry in entries):
        together = ((first, second),)
    return replace(
        entries[0],
        together=together,
        given=any(entry.given for entry in entries),
        **{name: all_of(name) for name in (*fields, "aliases", "activated", "free")},  # type: ignore[arg-type]
    )
