"""Encoders of text."""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family, fused

_BERTS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")

_MPNET: Any = {part: f"attention.attn.{part}" for part in "qkvo"}

ENCODERS: tuple[Family, ...] = (
    Family(
        name="bert",
        layer="encoder.layer.{}",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        classes=tuple(f"{name}SelfAttention" for name in _BERTS),
    ),
    Family(
        name="distilbert",
        layer="transformer.layer.{}",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        classes=("DistilBertSelfAttention",),
    ),
    Family(
        name="mpnet",
        layer="encoder.layer.{}",
        **_MPNET,
        up="intermediate.dense",
        down="output.dense",
        fixed_heads=True,
        classes=("MPNetSelfAttention",),
    ),
    # The logits are sums of products of queries and keys, of texts and of positions alike.
    Family(
        name="deberta-v2",
        layer="encoder.layer.{}",
        q="attention.self.query_proj",
        k="attention.self.key_proj",
        v="attention.self.value_proj",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        met=True,
        classes=("DisentangledSelfAttention",),
    ),
    Family(
        name="albert",
        layer="albert_layers.{}",
        q="attention.query",
        k="attention.key",
        v="attention.value",
        o="attention.dense",
        up="ffn",
        down="ffn_output",
        classes=("AlbertAttention",),
        beside=r"attention\.LayerNorm\.(weight|bias)",
    ),
    Family(
        name="modernbert",
        layer="layers.{}",
        **fused("attn.Wqkv"),
        o="attn.Wo",
        gate="mlp.Wi",
        up="mlp.Wi",
        down="mlp.Wo",
        rotary=True,
        classes=("ModernBertAttention",),
    ),
)
