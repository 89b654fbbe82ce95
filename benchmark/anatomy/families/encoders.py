"""Encoders of text."""

from __future__ import annotations

from benchmark.anatomy.families.row import Family

_BERTS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")

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
)
