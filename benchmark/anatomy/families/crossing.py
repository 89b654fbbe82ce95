"""Encoder–decoders, and the attention with which a decoder reads an encoder.

A layer of a decoder has two attentions: one row is of its own with the MLP, one of that which
crosses over, ``NAME-cross``.
"""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family

_T5S = ("T5Attention", "MT5Attention", "UMT5Attention")
#: All copies of one class; what of their norms differs is in the rows of wirings.
_BARTS = ("Bart", "MBart", "PLBart", "Pegasus", "Marian", "M2M100", "TrOCR", "Whisper")
_BART_CLASSES = tuple(f"{name}Attention" for name in _BARTS)


def _t5(name: str, up: str, gate: str | None = None) -> tuple[Family, ...]:
    """Encoder layers, and decoder layers without the attention between."""

    def row(part: str, attention: str, mlp: str) -> Family:
        q, k, v, o = (f"{attention}.{letter}" for letter in "qkvo")
        inner = f"{mlp}.DenseReluDense"
        return Family(
            name=f"{name}-{part}",
            layer="block.{}",
            q=q,
            k=k,
            v=v,
            o=o,
            up=f"{inner}.{up}",
            down=f"{inner}.wo",
            gate=gate and f"{inner}.{gate}",
            classes=_T5S,
            fixed_heads=True,
        )

    return (
        row("encoder", "layer.0.SelfAttention", "layer.1"),
        row("decoder", "layer.0.SelfAttention", "layer.2"),
    )


def _projections(attention: str) -> Any:
    names = {side: f"{attention}.{side}_proj" for side in "qkv"}
    return {"layer": "layers.{}", **names, "o": f"{attention}.out_proj", "classes": _BART_CLASSES}


CROSSING: tuple[Family, ...] = (
    *_t5("t5", up="wi"),
    *_t5("t5-gated", up="wi_1", gate="wi_0"),
    Family(
        name="t5-cross",
        layer="block.{}",
        q="layer.1.EncDecAttention.q",
        k="layer.1.EncDecAttention.k",
        v="layer.1.EncDecAttention.v",
        o="layer.1.EncDecAttention.o",
        classes=_T5S,
        fixed_heads=True,
    ),
    *(
        Family(
            name=name,
            **_projections("self_attn"),
            up="fc1",
            down="fc2",
            settings=(("scale_embedding", scaled),),
        )
        for name, scaled in (("bart", False), ("bart-scaled", True))
    ),
    Family(name="bart-cross", **_projections("encoder_attn")),
    Family(
        name="gpt2-cross",
        layer="h.{}",
        q="crossattention.q_attn",
        k="crossattention.c_attn",
        v="crossattention.c_attn",
        o="crossattention.c_proj",
        classes=("GPT2Attention",),
        transposed=True,
    ),
    Family(
        name="bert-cross",
        layer="encoder.layer.{}",
        q="crossattention.self.query",
        k="crossattention.self.key",
        v="crossattention.self.value",
        o="crossattention.output.dense",
        classes=tuple(
            f"{name}CrossAttention"
            for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
        ),
    ),
)
