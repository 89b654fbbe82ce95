"""Encoders of sound, and the convolutions before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmark.anatomy.blocks import Linear
from benchmark.anatomy.families import FAMILIES
from benchmark.anatomy.gauges.rows.names import Names, roots_of
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.wiring import InstanceNorm, Norm, Segment, Stream, Writer
from benchmark.anatomy.whole import Anatomy

#: What stands before the layers is no part of their stream: a convolution of many channels at once
#: adds positions to what is projected.
_WAVES: Any = {
    "norms": ("layer_norm", "final_layer_norm"),
    "embeddings": (),
    "needs": ("feature_projection.projection.weight",),
    "places": ("encoder.pos_conv_embed",),
    "encodes": True,
    "heads": tuple(
        (f"{name}.", head, rest)
        for name in ("wav2vec2", "hubert", "unispeech", "unispeech_sat")
        for head, rest in (
            ("lm_head", ""), ("projector", r"classifier\.(weight|bias)"), ("classifier", ""),
        )
    ),
    "beside": r"(feature_projection\..*|masked_spec_embed|encoder\.pos_conv_embed\..*)",
}  # fmt: skip

AUDIO: tuple[Row, ...] = (
    Row(
        **_WAVES,
        families=("wav2vec2",),
        first=("encoder.layer_norm",),
        post=True,
    ),
    Row(
        **_WAVES,
        families=("wav2vec2-stable",),
        adapter=("adapter_layer.linear_1", "adapter_layer.norm"),
        last=("encoder.layer_norm",),
    ),
    # Whisper's encoder; its decoder is as BART's are.
    Row(
        families=("bart", "bart-scaled"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        embeddings=("embed_positions.weight",),
        needs=("conv2.weight",),
        marks=("conv2.weight",),
        places=("embed_positions.weight",),
        activated=("conv2.weight", "conv2.bias"),
        last=("layer_norm",),
        encodes=True,
        heads=(("encoder.", "projector", r"classifier\.(weight|bias)"),),
    ),
)


def waves(names: Names, anatomy: Anatomy) -> tuple[list[Stream], list[InstanceNorm]]:
    """The norms between the convolutions of wav2vec2 and its like, and the projection behind."""
    streams, norms = list[Stream](), list[InstanceNorm]()
    present = anatomy.family.split("+")
    for family in FAMILIES:
        if family.name in present and family.name in ("wav2vec2", "wav2vec2-stable"):
            for root in roots_of(family, anatomy, names.state):
                found = list(_convolutions(names, f"{root}feature_extractor."))
                # One norm in all is of each channel by itself, else there is one over all channels
                # behind every convolution.
                single = len(found) > 1 and found[1][1] is None
                for conv, norm in found:
                    if norm is not None and single:
                        norms.append(InstanceNorm(norm.name, conv, norm.gain))
                    elif norm is not None:
                        streams.append(_between(names, conv, norm))
                streams += _projection(names, root)
    return streams, norms


def _convolutions(names: Names, prefix: str) -> Iterator[tuple[Linear, Norm | None]]:
    number = 0
    while (conv := names.linear(f"{prefix}conv_layers.{number}.conv")) is not None:
        yield conv, names.plain_norm(f"{prefix}conv_layers.{number}.layer_norm")
        number += 1


def _between(names: Names, conv: Linear, norm: Norm) -> Stream:
    width = len(conv.weight.read(names.state))
    segment = Segment(conv.weight.key, width, writers=(Writer(conv),), norms=(norm,))
    return Stream(conv.weight.key, (segment,), renamed=False)


def _projection(names: Names, root: str) -> Iterator[Stream]:
    """Of a norm that a bare model gives too, and a quantizer reads, nothing is said."""
    norm = names.plain_norm(f"{root}feature_projection.layer_norm")
    reader = names.linear(f"{root}feature_projection.projection")
    quantized = any(key.startswith("quantizer.") for key in names.state)
    if root and norm is not None and reader is not None and not quantized:
        width = len(norm.gain.read(names.state))
        segment = Segment(norm.name, width, sources=(norm,), readers=(reader,))
        yield Stream(norm.name, (segment,), renamed=False)
