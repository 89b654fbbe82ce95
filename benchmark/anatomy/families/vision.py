"""Vision transformers, and both towers of CLIP."""

from __future__ import annotations

from benchmark.anatomy.families.row import Family

VISION: tuple[Family, ...] = (
    Family(
        name="vit",
        layer="layers.{}",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("ViTAttention",),
    ),
    Family(
        name="dinov2",
        layer="encoder.layer.{}",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("Dinov2Attention",),
    ),
    Family(
        name="clip",
        layer="encoder.layers.{}",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("CLIPAttention",),
    ),
    Family(
        name="open-clip",
        layer="resblocks.{}",
        q="attn.in_proj",
        k="attn.in_proj",
        v="attn.in_proj",
        o="attn.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        classes=("MultiheadAttention",),
        join="_",
    ),
)
