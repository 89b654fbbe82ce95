"""Encoders of sound, and Whisper."""

from __future__ import annotations

import functools

from torch import nn

from zoo import crossing
from zoo.shape import SHAPE, TEXT, WIDTH, Tiny

#: Bands of a spectrum, and how many steps of it one place takes.
BANDS, FRAMES = 8, 12
_FILTERS = 24


def whisper(head: str = "ForConditionalGeneration") -> nn.Module:
    return crossing.bart(
        "Whisper",
        head,
        num_mel_bins=BANDS,
        max_source_positions=FRAMES // 2,
        max_target_positions=16,
    )


def waves(name: str = "Wav2Vec2", head: str = "ForCTC", **fields: object) -> nn.Module:
    """wav2vec2, or one that is made after it."""
    import transformers

    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", head))
    sizes = {
        "vocab_size": TEXT["vocab_size"],
        "pad_token_id": TEXT["pad_token_id"],
        "conv_dim": (_FILTERS, _FILTERS, _FILTERS),
        "conv_stride": (4, 2, 2),
        "conv_kernel": (6, 3, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 4,
        **SHAPE,
    }
    return model(config(**{**sizes, **fields}))  # type: ignore[no-any-return]


STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
_BOTH = ("input_features", "decoder_input_ids")

MODELS: dict[str, Tiny] = {
    "whisper": (whisper, _BOTH),
    "wav2vec2": (waves, ("input_values",)),
    "wav2vec2-stable": (functools.partial(waves, **STABLE), ("input_values",)),
    "hubert": (
        functools.partial(waves, "Hubert", "ForSequenceClassification", classifier_proj_size=WIDTH),
        ("input_values",),
    ),
}
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("wav2vec2",)
KIN = ("wav2vec2-stable", "hubert")
#: Those with a decoder of as many layers as the encoder has.
CROSSING = ("whisper",)
