"""Vision transformers, and both towers of CLIP."""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family, fused

_VIT: Any = {
    **{part: f"attention.{part}_proj" for part in "qkvo"},
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_TIMM: Any = {"layer": "blocks.{}", "o": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}

#: SwinV2 and Donut's eyes.
_SWINV2: Any = {
    "layer": "blocks.{}",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "fixed_heads": True,
}

VISION: tuple[Family, ...] = (
    Family(
        name="vit",
        **_VIT,
        layer="layers.{}",
        classes=("ViTAttention", "ViTMAEAttention"),
    ),
    Family(name="deit", **_VIT, layer="layers.{}", classes=("DeiTAttention",)),
    Family(
        name="vit-mae-decoder",
        **_VIT,
        layer="decoder_layers.{}",
        classes=("ViTMAEAttention",),
    ),
    Family(name="beit", **_VIT, layer="layers.{}", fixed_heads=True, classes=("BeitAttention",)),
    Family(name="swin", **_VIT, layer="blocks.{}", fixed_heads=True, classes=("SwinAttention",)),
    Family(name="donut-swin", **_SWINV2, classes=("DonutSwinSelfAttention",)),
    Family(
        name="swinv2",
        **_SWINV2,
        cosine=True,
        classes=("Swinv2SelfAttention",),
        beside=r"attention\.self\.(logit_scale|continuous_position_bias_mlp\..*)",
    ),
    Family(
        name="dinov2",
        **_VIT,
        layer="encoder.layer.{}",
        classes=("Dinov2Attention", "Dinov2WithRegistersAttention"),
    ),
    Family(
        name="dinov2-swiglu",
        **{**_VIT, "up": "mlp.up_proj", "down": "mlp.down_proj"},
        layer="encoder.layer.{}",
        gate="mlp.gate_proj",
        activation="silu",
        classes=("Dinov2Attention", "Dinov2WithRegistersAttention"),
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
        classes=("CLIPAttention", "SiglipAttention", "Siglip2Attention"),
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
    Family(
        name="siglip-pool",
        layer="head",
        **fused("attention.in_proj"),
        o="attention.out_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("MultiheadAttention",),
        join="_",
    ),
    Family(
        name="timm-vit",
        **_TIMM,
        **fused("attn.qkv"),
        classes=("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"),
    ),
    Family(
        name="timm-pool",
        layer="attn_pool",
        q="q",
        k="kv",
        v="kv",
        o="proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("AttentionPoolLatent",),
        beside=r"(latent|norm\.(weight|bias)|mlp\..*)",
    ),
    Family(
        name="eva02",
        layer="blocks.{}",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.proj",
        up="mlp.fc1_x",
        gate="mlp.fc1_g",
        inner="mlp.norm",
        down="mlp.fc2",
        activation="silu",
        rotary=True,
        interleaved=True,
        classes=("EvaAttention",),
        settings=(("rotate_half", False),),
    ),
    Family(
        name="modified-resnet-pool",
        layer="attnpool",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="c_proj",
        classes=("AttentionPool2d",),
        beside="positional_embedding",
    ),
)
