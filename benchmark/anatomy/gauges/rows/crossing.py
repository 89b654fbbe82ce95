"""Encoder–decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmark.anatomy.gauges.rows.row import Row

_CLASSIFIER = ("classification_head.dense", r"classification_head\.out_proj\.(weight|bias)")
_T5: Any = {
    "embeddings": ("embed_tokens.weight",),
    "needs": ("embed_tokens.weight",),
    "last": ("final_layer_norm",),
    "centred": False,
    "encodes": True,
}
_BART: Any = {
    "norms": ("self_attn_layer_norm", "final_layer_norm"),
    "cross": ("bart-cross", "encoder_attn_layer_norm"),
    "embeddings": ("embed_tokens.weight", "embed_positions.weight"),
    "needs": ("embed_tokens.weight",),
    "places": ("embed_positions.weight",),
    "first": ("layernorm_embedding",),
    "encodes": True,
    "together": ((("embed_tokens.weight",), ("embed_positions.weight",)),),
    "heads": (
        ("model.decoder.", "lm_head", ""),
        ("model.decoder.", "output_projection", ""),
        ("model.decoder.", "proj_out", ""),
        ("model.decoder.", "qa_outputs", ""),
        ("model.decoder.", *_CLASSIFIER),
    ),
}


def _bart(name: str) -> Iterator[Row]:
    """MBart, Pegasus, M2M100 and Whisper's decoder have norms before their blocks, and one at the
    end; the others behind. Marian, which has no norm of the embeddings, makes up its positions anew
    whenever it is loaded."""
    named: Any = {**_BART, "families": (name,), "scaled": name == "bart-scaled"}
    yield Row(**named, marks=("layer_norm.weight",), last=("layer_norm",))
    yield Row(**named, marks=("layernorm_embedding.weight",), post=True)
    yield Row(
        **{**named, "embeddings": ("embed_tokens.weight",), "together": ()},
        beside=r"embed_positions\.weight",
        post=True,
    )


CROSSING: tuple[Row, ...] = (
    Row(
        families=("t5-encoder", "t5-gated-encoder"),
        **_T5,
        norms=("layer.0.layer_norm", "layer.1.layer_norm"),
        heads=(("transformer.encoder.", "classifier", ""),),
    ),
    Row(
        families=("t5-decoder", "t5-gated-decoder"),
        **_T5,
        norms=("layer.0.layer_norm", "layer.2.layer_norm"),
        cross=("t5-cross", "layer.1.layer_norm"),
        heads=(
            ("transformer.decoder.", *_CLASSIFIER),
            ("decoder.", "lm_head", ""),
            ("decoder.", "qa_outputs", ""),
        ),
    ),
    *(row for name in ("bart", "bart-scaled") for row in _bart(name)),
)
