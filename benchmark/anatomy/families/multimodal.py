"""Models of several towers, where these are of no other family: BLIP-2's eyes and its Q-Former.

The Q-Former is a BERT whose every second layer also attends to the image.
"""

from __future__ import annotations

from benchmark.anatomy.families.row import Family, fused

_QFORMERS = (
    "Blip2QFormerMultiHeadAttention",
    "InstructBlipQFormerMultiHeadAttention",
    "InstructBlipVideoQFormerMultiHeadAttention",
)

MULTIMODAL: tuple[Family, ...] = (
    Family(
        name="blip2-vision",
        layer="encoder.layers.{}",
        **fused("self_attn.qkv"),
        o="self_attn.projection",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=(
            "BlipAttention",
            "Blip2Attention",
            "InstructBlipAttention",
            "InstructBlipVideoAttention",
        ),
    ),
    Family(
        name="qformer",
        layer="encoder.layer.{}",
        q="attention.attention.query",
        k="attention.attention.key",
        v="attention.attention.value",
        o="attention.output.dense",
        up="intermediate_query.dense",
        down="output_query.dense",
        classes=_QFORMERS,
    ),
    Family(
        name="qformer-cross",
        layer="encoder.layer.{}",
        q="crossattention.attention.query",
        k="crossattention.attention.key",
        v="crossattention.attention.value",
        o="crossattention.output.dense",
        classes=_QFORMERS,
    ),
)
