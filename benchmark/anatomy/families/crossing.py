"""Encoder–decoders, whose decoders read the encoder."""

from __future__ import annotations

from benchmark.anatomy.families.row import Family


def _t5(name: str, up: str, gate: str | None = None) -> tuple[Family, ...]:
    """Encoder layers; decoder layers' self-attention; their cross-attention with the MLP."""

    def row(part: str, layer: str, attention: str, mlp: str | None) -> Family:
        q, k, v, o = (f"{attention}.{letter}" for letter in "qkvo")
        inner = None if mlp is None else f"{mlp}.DenseReluDense"
        return Family(
            name=f"{name}-{part}",
            layer=layer,
            q=q,
            k=k,
            v=v,
            o=o,
            up=inner and f"{inner}.{up}",
            down=inner and f"{inner}.wo",
            gate=inner and gate and f"{inner}.{gate}",
            classes=("T5Attention",),
            fixed_heads=True,
        )

    return (
        row("encoder", "encoder.block.{}", "layer.0.SelfAttention", "layer.1"),
        row("decoder", "decoder.block.{}", "layer.0.SelfAttention", None),
        row("cross", "decoder.block.{}", "layer.1.EncDecAttention", "layer.2"),
    )


CROSSING: tuple[Family, ...] = (
    *_t5("t5", up="wi"),
    *_t5("t5-gated", up="wi_1", gate="wi_0"),
)
