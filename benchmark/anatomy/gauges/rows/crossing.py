"""Encoder–decoders, whose streams are one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmark.anatomy.blocks import Linear
from benchmark.anatomy.families import Family
from benchmark.anatomy.gauges.rows.names import Names, Side, head_of, roots_of, wholes
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.wiring import (
    Norm,
    Segment,
    Stream,
    Writer,
)
from benchmark.anatomy.whole import Anatomy

#: Parts of T5, and the number of the sub-layer that each family's attention is.
_T5 = {"encoder": 0, "decoder": 0, "cross": 1}
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def t5(names: Names, anatomy: Anatomy, present: Sequence[Family]) -> Iterator[tuple[str, Stream]]:
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
        and (roots := roots_of(family, anatomy, state))
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
                block, sides = layer.attention, list[Side]()
                read = (block.q,) if part == "cross" else (block.q, block.k, block.v)
                sides.append(Side(wholes(*read), Writer(block.o, None, block), None))
                if part == "cross":
                    crossing += wholes(block.k, block.v)
                if layer.mlp is not None:
                    sides.append(
                        Side(wholes(layer.mlp.up, layer.mlp.gate), Writer(layer.mlp.down), None)
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
        head, tied = head_of(names, heads, root, embeddings, width)
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
