"""Encoders of sound. Whisper, which has a decoder too, has the rows of BART."""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family

_WAVES: Any = {
    "layer": "encoder.layers.{}",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.out_proj",
    "up": "feed_forward.intermediate_dense",
    "down": "feed_forward.output_dense",
    "classes": tuple(
        f"{name}Attention" for name in ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat")
    ),
}

AUDIO: tuple[Family, ...] = (
    # The same names; the configuration says whether norms stand before the blocks or behind.
    Family(name="wav2vec2", **_WAVES, settings=(("do_stable_layer_norm", False),)),
    Family(name="wav2vec2-stable", **_WAVES, settings=(("do_stable_layer_norm", True),)),
)
