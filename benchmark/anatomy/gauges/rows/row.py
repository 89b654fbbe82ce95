"""One row of the table of wirings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transform:
    """A head of several layers, named below what holds the tower ``owner``: what reads the last
    norm, the norm behind its activation, the output that reads this, and a pattern of the rest."""

    owner: str
    dense: str
    norm: str
    output: str
    rest: str = ""


@dataclass(frozen=True)
class Row:
    """One wiring.

    Attributes:
        families: names of rows of :data:`benchmark.anatomy.families.FAMILIES`.
        norms: before (``post``: behind) attention and MLP; one name twice where both read one norm
            in parallel, None where they read the stream itself.
        embeddings: what may be added; ``needs``: those of which one must be there.
        last: the last norm, by any of these names; none in post-LN models.
        centred: LayerNorm. ``offset``: gains are 1 + w.
        post: a norm follows the sum of stream and block, not the other way round.
        behind: norms between the writers and the stream.
        scales: layer scales of attention and MLP, by any of these names.
        first: a norm between the embeddings and the first layer.
        together: pairs of embeddings that are always added, ``name`` or ``name[start:stop]``;
            of each side the first name must be there.
        scaled: the first of each such pair are multiplied by the root of the stream's width.
        inside: what stands between ``root`` and the layer.
        heads: ``(root, head, rest)``: the head of a model whose tower is at ``root``; ``rest``, if
            given, is a pattern of what follows the head, which must be there.
        transforms: heads of several layers.
        beside: a pattern of tensors below ``root`` that hang on the model's output, or only on the
            input.
        marks: tensors below ``root``, all of which must be there: they tell rows apart.
        encodes: the model's output is what the last norm gives, and a decoder that reads it reads
            that.
        cross: the family of the attention with which a layer reads an encoder, and its norm.
        bare: the attention of the first layer reads the stream itself.
        adapter: the first map of an MLP that stands behind a layer's own, and its norm.
        places: positions that are added to the embeddings. Where the State has none of those that
            are ``embeddings``, what the code makes up instead is added.
        activated: embeddings that an activation stands behind.
    """

    families: tuple[str, ...]
    norms: tuple[str, str] | None
    embeddings: tuple[str, ...]
    needs: tuple[str, ...]
    last: tuple[str, ...] = ()
    centred: bool = True
    offset: float = 0.0
    post: bool = False
    behind: tuple[str, str] | None = None
    scales: tuple[tuple[str, str], ...] = ()
    first: tuple[str, ...] = ()
    together: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    scaled: bool = False
    inside: str = ""
    heads: tuple[tuple[str, str, str], ...] = ()
    transforms: tuple[Transform, ...] = ()
    beside: str = ""
    marks: tuple[str, ...] = ()
    encodes: bool = False
    cross: tuple[str, str] | None = None
    bare: bool = False
    adapter: tuple[str, str] | None = None
    places: tuple[str, ...] = ()
    activated: tuple[str, ...] = ()
