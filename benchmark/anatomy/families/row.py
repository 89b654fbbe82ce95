"""One row of the table of families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row. Names are relative to ``layer`` and lack ``.weight`` / ``.bias``.

    ``q`` = ``k`` = ``v`` means one fused tensor with the three stacked in that order, or, where
    they are ``per_head``, taking turns: the queries of a KV head, its key, its value. ``k`` = ``v``
    alone: one tensor, the keys first. ``gate`` = ``up``: one tensor, the gate's half first.
    ``o`` = ``down``: one tensor, the columns that read attention first.
    ``join`` stands between a name and ``weight`` or ``bias`` in the q, k and v names.
    ``classes`` are the classes of the module that owns q whose gauge group was checked.
    A row without ``up`` and ``down`` is attention alone (that of decoders which reads an encoder).
    ``gate`` is the activated branch of a gated MLP. ``qk_norm``: the gains of Q's and K's norm, per
    head or (``whole_norm``) over all of them. ``settings``: what the configuration must say.
    ``inner``: a norm over the hidden units. ``cosine``: queries and keys get unit length.
    ``met``: more than queries meets the keys. ``turns``: the attribute of a rotary attention that
    says whether this layer's rotates, where not all do.
    ``activation``: that of the MLP where the configuration does not tell it.
    ``joint``: q, k, v and o of a second stream in the same heads; o may be missing in a layer.
    ``processors``: the classes of what runs the attention, where it is a part of its own, whose
    forward pass was checked.
    ``beside``: a pattern of further names below the layer whose weights the row answers for.
    """

    name: str
    layer: str
    q: str
    k: str
    v: str
    o: str
    classes: tuple[str, ...]
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    qk_norm: tuple[str, str] | None = None
    join: str = "."
    transposed: bool = False
    rotary: bool = False
    fixed_heads: bool = False
    interleaved: bool = False
    whole_norm: bool = False
    per_head: bool = False
    settings: tuple[tuple[str, object], ...] = ()
    inner: str | None = None
    cosine: bool = False
    met: bool = False
    turns: str = "use_rope"
    activation: str = ""
    joint: tuple[str, str, str, str] | None = None
    processors: tuple[str, ...] = ()
    beside: str = ""

    def layers(self, names: Iterable[str]) -> list[str]:
        """``encoder.layer.0.``, ``encoder.layer.1.``, … with their prefixes, in order.

        The number behind what has none (an attention pool) is 0.
        """
        layer = re.escape(self.layer)
        layer = layer.replace(r"\{\}", r"(\d+)") if "{}" in self.layer else f"{layer}()"
        query = re.escape(f"{self.q}{self.join}weight")
        pattern = re.compile(rf"((?:.*\.)?){layer}\.{query}")
        found = sorted(
            (match[1], int(match[2] or 0)) for name in names if (match := pattern.fullmatch(name))
        )
        return [f"{prefix}{self.layer.format(number)}." for prefix, number in found]

    def weights(self) -> Iterator[str]:
        """The weights that each layer must have, relative to it."""
        for name in (self.q, self.k, self.v):
            yield f"{name}{self.join}weight"
        further = (*(self.qk_norm or ()), *(self.joint or ())[:3])
        for name in (self.o, self.up, self.down, self.gate, *further):
            if name is not None:
                yield f"{name}.weight"


def fused(name: str) -> Any:
    """Queries, keys and values in one tensor."""
    return dict.fromkeys("qkv", name)
