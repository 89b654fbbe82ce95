"""Where each family keeps its norms, embeddings and heads: one row of names per wiring.

A row belongs to the families of :mod:`benchmark.anatomy.families` of its names, whose layers say
where the blocks are. Names are relative: of norms and layer scales to the layer, of embeddings and
the last norm to ``root``, the part before the layer's own name without ``inside``.

Nothing in part: a tensor of the tower that neither the row nor a block answers for may read or
write anything, so the gauges outside the blocks are then not offered, and ``Wiring.uncovered`` says
which tensor it was. A head is known by the name that its own class gives it; without one, what the
last norm gives is the model's output, and nothing may change it. Convolutional towers:
:mod:`.convolutional`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Axis, Linear, MLPBlock, Slot
from benchmark.anatomy.families import FAMILIES, Family
from benchmark.anatomy.gauges.convolutional import convolutional
from benchmark.anatomy.gauges.wiring import (
    Norm,
    Part,
    Segment,
    Shifted,
    Stream,
    Wiring,
    Writer,
    whole,
)
from benchmark.anatomy.whole import Anatomy

#: What reads nothing of a stream and writes nothing into it.
_BESIDE = re.compile(r".*(relative_attention_bias\.weight|logit_scale|logit_bias|\.inv_freq)")


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
        inside: what stands between ``root`` and the layer.
        heads: ``(root, head, rest)``: the head of a model whose tower is at ``root``; ``rest``, if
            given, is a pattern of what follows the head, which must be there.
        beside: a pattern of tensors below ``root`` that hang on the model's output.
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
    inside: str = ""
    heads: tuple[tuple[str, str, str], ...] = ()
    beside: str = ""


_TOKENS = "embeddings.word_embeddings.weight"
_PLACES = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
_PATCH = "embeddings.patch_embeddings.projection"
_VIT: tuple[tuple[str, ...], ...] = (
    (f"{_PATCH}.weight", f"{_PATCH}.bias", "embeddings.cls_token", "embeddings.mask_token",
     "embeddings.position_embeddings"),
    (f"{_PATCH}.weight",),
)  # fmt: skip
_VIT_TOGETHER = (
    (("embeddings.cls_token",), ("embeddings.position_embeddings[0:1]",)),
    (
        (f"{_PATCH}.bias", "embeddings.mask_token"),
        ("embeddings.position_embeddings[1:]",),
    ),
)
_LLAMA: Any = {
    "embeddings": ("embed_tokens.weight",),
    "needs": ("embed_tokens.weight",),
    "last": ("norm", "final_layernorm"),
    "heads": (("model.", "lm_head", ""), ("model.", "score", "")),
}
_TRANSFORMER_HEADS = (("transformer.", "lm_head", ""), ("transformer.", "score", ""))

ROWS: tuple[Row, ...] = (
    Row(
        families=("bert",),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        embeddings=(_TOKENS, _PLACES, _TYPES),
        needs=(_TOKENS,),
        first=("embeddings.LayerNorm",),
        post=True,
        together=(((_TOKENS,), (_PLACES,)), ((_TYPES,), (_PLACES,))),
        heads=(
            ("bert.", "bert.pooler.dense", r"classifier\.(weight|bias)"),
            ("roberta.", "classifier.dense", r"classifier\.out_proj\.(weight|bias)"),
        ),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("distilbert",),
        norms=("sa_layer_norm", "output_layer_norm"),
        embeddings=(_TOKENS, _PLACES),
        needs=(_TOKENS,),
        first=("embeddings.LayerNorm",),
        post=True,
        together=(((_TOKENS,), (_PLACES,)),),
        heads=(("distilbert.", "pre_classifier", r"classifier\.(weight|bias)"),),
    ),
    Row(
        families=("vit",),
        norms=("layernorm_before", "layernorm_after"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        last=("layernorm",),
        together=_VIT_TOGETHER,
        heads=(("vit.", "classifier", ""),),
        beside=r"pooler\.dense\.(weight|bias)",
    ),
    Row(
        families=("dinov2",),
        norms=("norm1", "norm2"),
        embeddings=_VIT[0],
        needs=_VIT[1],
        last=("layernorm",),
        scales=(("layer_scale1.lambda1", "layer_scale2.lambda1"),),
        together=_VIT_TOGETHER,
    ),
    Row(
        families=("clip",),
        norms=("layer_norm1", "layer_norm2"),
        embeddings=(
            "embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
            "embeddings.class_embedding", "embeddings.patch_embedding.weight",
        ),
        needs=("embeddings.token_embedding.weight", "embeddings.patch_embedding.weight"),
        first=("pre_layrnorm",),
        last=("final_layer_norm", "post_layernorm"),
        together=(
            (("embeddings.token_embedding.weight",), ("embeddings.position_embedding.weight",)),
            (("embeddings.class_embedding",), ("embeddings.position_embedding.weight[0:1]",)),
        ),
        heads=(
            ("text_model.", "text_projection", ""),
            ("vision_model.", "visual_projection", ""),
        ),
    ),
    Row(
        families=("open-clip",),
        norms=("ln_1", "ln_2"),
        embeddings=(
            "token_embedding.weight", "positional_embedding", "class_embedding", "conv1.weight",
        ),
        needs=("token_embedding.weight", "conv1.weight"),
        first=("ln_pre",),
        last=("ln_final", "ln_post"),
        scales=(("ls_1.gamma", "ls_2.gamma"),),
        together=(
            (("token_embedding.weight",), ("positional_embedding",)),
            (("class_embedding",), ("positional_embedding[0:1]",)),
        ),
        inside="transformer.",
        heads=(("visual.", "visual.proj", ""), ("", "text_projection", "")),
    ),
    Row(
        families=("gpt2",),
        norms=("ln_1", "ln_2"),
        embeddings=("wte.weight", "wpe.weight"),
        needs=("wte.weight",),
        last=("ln_f",),
        together=((("wte.weight",), ("wpe.weight",)),),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("llama", "qwen3"),
        **_LLAMA,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        behind=("post_attention_layernorm", "post_feedforward_layernorm"),
        centred=False,
        offset=1.0,
    ),
    Row(
        families=("llama", "qwen3", "phi3"),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
        centred=False,
    ),
    Row(
        families=("gemma",),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
        centred=False,
        offset=1.0,
    ),
    Row(
        families=("olmo2",),
        **_LLAMA,
        norms=None,
        behind=("post_attention_layernorm", "post_feedforward_layernorm"),
        centred=False,
    ),
    Row(
        families=("starcoder2", "stablelm"),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        families=("stablelm", "cohere", "phi"),
        **_LLAMA,
        norms=("input_layernorm", "input_layernorm"),
    ),
    Row(
        families=("opt",),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        embeddings=("embed_tokens.weight", "embed_positions.weight"),
        needs=("embed_tokens.weight",),
        last=("final_layer_norm",),
        together=((("embed_tokens.weight",), ("embed_positions.weight",)),),
        heads=(("model.decoder.", "lm_head", ""), ("model.decoder.", "score", "")),
    ),
    Row(
        families=("gptj",),
        norms=("ln_1", "ln_1"),
        embeddings=("wte.weight",),
        needs=("wte.weight",),
        last=("ln_f",),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("gpt-neox",),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("embed_in.weight",),
        needs=("embed_in.weight",),
        last=("final_layer_norm",),
        heads=(
            ("gpt_neox.", "lm_head", ""), ("gpt_neox.", "embed_out", ""),
            ("gpt_neox.", "score", ""),
        ),
    ),
    *(
        Row(
            families=("falcon", "falcon-alibi"),
            norms=norms,
            embeddings=("word_embeddings.weight",),
            needs=("word_embeddings.weight",),
            last=("ln_f",),
            heads=_TRANSFORMER_HEADS,
        )
        for norms in (
            ("ln_attn", "ln_mlp"),
            ("input_layernorm", "post_attention_layernorm"),
            ("input_layernorm", "input_layernorm"),
        )
    ),
    Row(
        families=("bloom",),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("word_embeddings.weight",),
        needs=("word_embeddings.weight",),
        first=("word_embeddings_layernorm",),
        last=("ln_f",),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("mpt",),
        norms=("norm_1", "norm_2"),
        embeddings=("wte.weight",),
        needs=("wte.weight",),
        last=("norm_f",),
        heads=_TRANSFORMER_HEADS,
    ),
)  # fmt: skip


#: Parts of T5, and the number of the sub-layer that each family's attention is.
_T5 = {"encoder": 0, "decoder": 0, "cross": 1}
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True)
class _Layer:
    """One layer: its full name and its blocks."""

    name: str
    attention: AttentionBlock
    mlp: MLPBlock | None


class _Names:
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
        return Norm(name, _gain(gain.key, row), found, row.centred)

    def linear(self, name: str) -> Linear | None:
        """A layer by its name; a bare (in, out) matrix by its own."""
        if name in self.state:
            return Linear(replace(self.slot(name), transposed=True))
        if f"{name}.weight" not in self.state:
            return None
        bias = self.slot(f"{name}.bias")
        return Linear(self.slot(f"{name}.weight"), bias if bias.key in self.state else None)


def wiring(anatomy: Anatomy, state: Mapping[str, Tensor]) -> Wiring:
    """The streams and batch norms of a model, from the names of ``state``."""
    names = _Names(state)
    for block in anatomy.attention:
        for linear in block.linears().values():
            names.used.update(slot.key for slot in linear.slots())
        names.used.update(slot.key for slot in block.qk_norm or ())
    for units in anatomy.units:
        names.used.update(axis.slot.key for axis in units.axes)
    for mlp in anatomy.mlp:
        names.used.update(slot.key for slot in mlp.down.slots())
    families = {family.name: family for family in FAMILIES}
    present = [families[name] for name in anatomy.family.split("+") if name in families]
    towers: list[tuple[str, Stream]] = list(_t5(names, anatomy, present))
    for family in present:
        for root, layers in _roots(family, anatomy, state).items():
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
    # What lies in no tower may read any of them.
    roots = [root for root, _ in towers]
    outside = [key for key in left if not any(key.startswith(root) for root in roots)]
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


def _row(family: Family, layers: Sequence[_Layer], state: Mapping[str, Tensor]) -> Row | None:
    """The row whose norms every layer has."""
    for row in ROWS:
        wanted = [*(row.norms or ()), *(row.behind or ())]
        if family.name in row.families and all(
            f"{layer.name}{norm}.weight" in state for layer in layers for norm in wanted
        ):
            return row
    return None


def _roots(
    family: Family, anatomy: Anatomy, state: Mapping[str, Tensor]
) -> dict[str, list[_Layer]]:
    """The layers of each tower of a family, in order, by what stands before them."""
    blocks = {block.q.weight.key: block for block in anatomy.attention}
    mlps = {mlp.up.weight.key: mlp for mlp in anatomy.mlp}
    found: dict[str, list[_Layer]] = {}
    ends = re.compile(re.escape(family.layer).replace(r"\{\}", r"\d+") + r"\.")
    for name in family.layers(state):
        block = blocks.get(f"{name}{family.q}{family.join}weight")
        end = ends.search(name)
        if block is not None and end is not None:
            layer = _Layer(name, block, mlps.get(f"{name}{family.up}.weight"))
            found.setdefault(name[: end.start()], []).append(layer)
    return found


def _tower(names: _Names, row: Row, root: str, layers: Sequence[_Layer]) -> Stream:
    state = names.state
    embeddings = tuple(names.axis(root + key) for key in row.embeddings if root + key in state)
    first = [names.norm(root + n, row) for n in row.first if f"{root}{n}.weight" in state]
    last = [names.norm(root + n, row) for n in row.last if f"{root}{n}.weight" in state]
    norms = [
        tuple(names.norm(layer.name + norm, row) for norm in row.norms or ()) for layer in layers
    ]
    width = layers[0].attention.q.weight.read(state).shape[1]
    sides = [side for layer in layers for side in _sides(names, row, layer)]
    head, tied = _head(names, row, root, embeddings, width)
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
            together=tuple(_together(row, root, names)),
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
class _Side:
    """Attention or MLP of a layer: what reads, what writes, the norm behind it if there is one."""

    readers: tuple[Linear, ...]
    writer: Writer
    behind: Norm | None


@dataclass(frozen=True)
class _Parts:
    """What a tower is made of, before it is cut into segments."""

    root: str
    width: int
    entry: Segment
    first: Norm | None
    norms: tuple[tuple[Norm, ...], ...]
    sides: tuple[_Side, ...]
    last: Norm
    end: Segment

    def behind(self) -> Iterator[Norm]:
        """The norms between the writers and the stream."""
        return (side.behind for side in self.sides if side.behind is not None)


def _sides(names: _Names, row: Row, layer: _Layer) -> tuple[_Side, ...]:
    scales: list[Slot | None] = [None, None]
    for pair in row.scales:
        if all(layer.name + key in names.state for key in pair):
            scales = [names.slot(layer.name + key) for key in pair]
    behind: list[Norm | None] = [None, None]
    if row.behind is not None:
        behind = [names.norm(layer.name + norm, row) for norm in row.behind]
    block, mlp = layer.attention, layer.mlp
    if block.qk_norm is not None:
        q, k = (_gain(slot.key, row) for slot in block.qk_norm)
        names.qk_gains.append((block, (q, k)))
    found = [_Side(_whole(block.q, block.k, block.v), Writer(block.o, scales[0], block), behind[0])]
    if mlp is not None:
        found.append(_Side(_whole(mlp.up, mlp.gate), Writer(mlp.down, scales[1]), behind[1]))
    return tuple(found)


def _gain(key: str, row: Row) -> Slot:
    return Shifted(key, offset=row.offset) if row.offset else Slot(key)


def _whole(*linears: Linear | None) -> tuple[Linear, ...]:
    return tuple(dict.fromkeys(whole(linear) for linear in linears if linear is not None))


def _head(
    names: _Names, row: Row, root: str, embeddings: tuple[Axis, ...], width: int
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


def _together(
    row: Row, root: str, names: _Names
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


def _t5(names: _Names, anatomy: Anatomy, present: Sequence[Family]) -> Iterator[tuple[str, Stream]]:
    """T5: the streams of encoder and decoder are one, for they share their embedding.

    The decoder's cross-attention reads the encoder's last norm.
    """
    state = names.state
    row = Row((), ("", ""), (), (), centred=False)
    parts = {
        part: roots
        for family in present
        if (part := family.name.removeprefix("t5-").removeprefix("gated-")) in _T5
        and family.name.startswith("t5")
        and (roots := _roots(family, anatomy, state))
    }
    for root in parts.get("encoder", {}):
        layers = {part: roots.get(root, []) for part, roots in parts.items()}
        last = {n: f"{root}{n}.final_layer_norm" for n in ("encoder", "decoder")}
        shared = [f"{root}{name}" for name in _T5_EMBEDDINGS if f"{root}{name}" in state]
        if f"{last['encoder']}.weight" not in state or not shared:
            continue
        embeddings = tuple(names.axis(key) for key in shared)
        segments, writers, norms, crossing = [], list[Writer](), list[Norm](), list[Linear]()
        width = state[shared[0]].shape[1]
        for part, found in layers.items():
            for layer in found:
                block, sides = layer.attention, list[_Side]()
                read = (block.q,) if part == "cross" else (block.q, block.k, block.v)
                sides.append(_Side(_whole(*read), Writer(block.o, None, block), None))
                if part == "cross":
                    crossing += _whole(block.k, block.v)
                if layer.mlp is not None:
                    sides.append(
                        _Side(_whole(layer.mlp.up, layer.mlp.gate), Writer(layer.mlp.down), None)
                    )
                for number, side in enumerate(sides, _T5[part]):
                    norm = names.norm(f"{layer.name}layer.{number}.layer_norm", row)
                    norms.append(norm)
                    writers.append(side.writer)
                    segments.append(
                        Segment(norm.name, width, sources=(norm,), readers=side.readers)
                    )
        ends = {n: names.norm(key, row) for n, key in last.items() if f"{key}.weight" in state}
        heads = replace(row, heads=(("", "lm_head", ""),))
        head, tied = _head(names, heads, root, embeddings, width)
        encoded = tuple(crossing)
        segments.append(
            Segment(
                last["encoder"],
                width,
                sources=(ends["encoder"],),
                readers=encoded,
                open=not encoded,
            )
        )
        if "decoder" in ends:
            segments.append(
                Segment(
                    last["decoder"],
                    width,
                    sources=(ends["decoder"],),
                    readers=head,
                    head=bool(head),
                    open=not head and not tied,
                    tied=tied,
                )
            )
        main = Segment(
            f"{root}stream",
            width,
            embeddings=tuple(dict.fromkeys((*embeddings, *tied))),
            writers=tuple(writers),
            norms=(*norms, *ends.values()),
            tied=tied,
            after_tied=(ends["decoder"],) if tied else (),
        )
        mlps = tuple(x.mlp for found in layers.values() for x in found if x.mlp is not None)
        yield root, Stream(root or "model", (main, *segments), mlps)
