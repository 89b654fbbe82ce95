"""Norms, layer scales and batch norms of convolutional towers, by the rows that anatomy has.

Their channels trade places in :class:`benchmark.anatomy.Channels`; what is written here are the
gauges beside: of a block's norm and layer scale in a ConvNeXt, of every batch norm in a ResNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from benchmark.anatomy.blocks import Linear, Slot
from benchmark.anatomy.convolutional import ROWS, ConvNeXt, ResNet
from benchmark.anatomy.gauges.wiring import BatchNorm, Norm, Segment, Stream, Writer
from benchmark.anatomy.whole import Anatomy


def convolutional(
    anatomy: Anatomy, state: Mapping[str, Tensor]
) -> tuple[tuple[Stream, ...], tuple[BatchNorm, ...], tuple[str, ...]]:
    """The streams and batch norms of all convolutional towers, and what their names start with."""
    families, prefixes = anatomy.family.split("+"), list[str]()
    streams, norms = list[Stream](), list[BatchNorm]()
    for row in ROWS:
        if f"{type(row).__name__.lower()}-{row.name}" not in families:
            continue
        pattern = re.compile(rf"((?:.*\.)?){re.escape(row.mark)}")
        for prefix in (match[1] for key in state if (match := pattern.fullmatch(key))):
            prefixes.append(prefix)
            if isinstance(row, ConvNeXt):
                streams += _convnext(row, prefix, state)
            else:
                norms += _resnet(row, prefix, state)
    return tuple(streams), tuple(norms), tuple(prefixes)


def _convnext(row: ConvNeXt, prefix: str, state: Mapping[str, Tensor]) -> Iterator[Stream]:
    stage = 0
    while f"{prefix}{row.block.format(stage, 0)}.{row.depthwise}.weight" in state:
        norm, conv = (f"{prefix}{name.format(stage)}" for name in row.downsample)
        if f"{conv}.weight" in state:
            yield _read(norm, conv, state)
        number = 0
        while (
            f"{(block := prefix + row.block.format(stage, number))}.{row.depthwise}.weight" in state
        ):
            yield _block(row, block, state)
            number += 1
        stage += 1
    above = prefix.rpartition(".")[0].rpartition(".")[0]
    above = f"{above}." if above else ""
    # The heads whose own class puts the last norm right before them.
    for norm, head in (
        (f"{prefix}layernorm", f"{above}classifier"),
        (f"{prefix}head.norm", f"{prefix}head.fc"),
    ):
        if f"{norm}.weight" in state and f"{head}.weight" in state:
            yield _read(norm, head, state)


def _read(norm: str, reader: str, state: Mapping[str, Tensor]) -> Stream:
    """A norm that one layer reads."""
    gives = _norm(norm, state)
    width = len(state[gives.gain.key])
    segment = Segment(norm, width, sources=(gives,), readers=(Linear.named(reader, state),))
    return Stream(norm, (segment,), renamed=False)


def _block(row: ConvNeXt, block: str, state: Mapping[str, Tensor]) -> Stream:
    norm = _norm(f"{block}.{row.norm}", state)
    width = len(state[norm.gain.key])
    depthwise, up, down = (
        Linear.named(f"{block}.{n}", state) for n in (row.depthwise, row.up, row.down)
    )
    segments = [
        Segment(f"{block}.{row.depthwise}", width, norms=(norm,), depthwise=depthwise),
        Segment(norm.name, width, sources=(norm,), readers=(up,)),
    ]
    if (scale := f"{block}.{row.scale}") in state:
        writer = Writer(down, Slot(scale))
        segments.append(Segment(scale, width, writers=(writer,)))
    return Stream(block, tuple(segments), renamed=False)


def _resnet(row: ResNet, prefix: str, state: Mapping[str, Tensor]) -> Iterator[BatchNorm]:
    pairs = list(row.stem)
    stage = row.stage
    first = row.convs[0].format(row.first)
    while f"{prefix}{row.block.format(stage, 0)}.{first}.weight" in state:
        number = 0
        while f"{prefix}{(block := row.block.format(stage, number))}.{first}.weight" in state:
            inner = range(row.first, row.first + 3)
            names = [tuple(name.format(i) for name in row.convs) for i in inner]
            pairs += [(f"{block}.{a}", f"{block}.{b}") for a, b in (*names, *row.shortcuts)]
            number += 1
        stage += 1
    for conv, norm in dict.fromkeys(pairs):
        conv, norm = prefix + conv, prefix + norm
        if f"{conv}.weight" in state and f"{norm}.running_var" in state:
            yield BatchNorm(
                norm,
                Linear.named(conv, state),
                *(
                    Slot(f"{norm}.{part}")
                    for part in ("weight", "bias", "running_mean", "running_var")
                ),
            )


def _norm(name: str, state: Mapping[str, Tensor]) -> Norm:
    bias = f"{name}.bias"
    return Norm(name, Slot(f"{name}.weight"), Slot(bias) if bias in state else None, centred=True)
