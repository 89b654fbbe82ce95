"""Encoder–decoders."""

from __future__ import annotations

import functools

from torch import nn

from zoo.shape import (
    HEADS,
    HIDDEN,
    LAYERS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Tiny,
)


def _t5(feed_forward: str = "relu") -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj=feed_forward,
    )
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Tiny] = {
    "t5": (_t5, (*TOKENS, "decoder_input_ids")),
    "t5-gated": (functools.partial(_t5, "gated-gelu"), (*TOKENS, "decoder_input_ids")),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("t5",)
#: Those with a gated MLP.
GATED = ("t5-gated",)
