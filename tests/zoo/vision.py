"""Vision transformers and CLIP."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from zoo.shape import (
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    LENGTH,
    SHAPE,
    TEXT,
    VOCABULARY,
    WIDTH,
    Tiny,
)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=5, **IMAGE, **SHAPE))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    shape = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    return Dinov2Model(Dinov2Config(mlp_ratio=2, **IMAGE, **shape))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**TEXT, **SHAPE, "max_position_embeddings": LENGTH}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**IMAGE, **SHAPE}, projection_dim=16)
    )


def _clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=16, **IMAGE, **SHAPE))


def _open_clip(custom_text: bool = False) -> nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP

    vision = {
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        **IMAGE,
    }
    text = {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    cls = CustomTextCLIP if custom_text else CLIP
    return cls(embed_dim=16, vision_cfg=vision, text_cfg=text)


def _siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {**TEXT, **SHAPE, "max_position_embeddings": LENGTH, "projection_size": WIDTH}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**IMAGE, **SHAPE}))


def _transformers(name: str, head: str = "ForImageClassification", **fields: Any) -> nn.Module:
    """An image model of transformers; ``fields`` replace the shape's, None leaves one out."""
    import transformers

    shape = {"num_labels": 5, **IMAGE, **SHAPE, **fields}
    shape = {key: value for key, value in shape.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**shape)
    return getattr(transformers, f"{name}{head}")(config)  # type: ignore[no-any-return]


_SWIN: dict[str, Any] = {
    "hidden_size": None, "num_attention_heads": None, "num_hidden_layers": None,
    "intermediate_size": None, "image_size": 8, "patch_size": 2, "embed_dim": 32, "depths": [1, 1],
    "num_heads": [4, 8], "window_size": 2, "mlp_ratio": 1.5,
}  # fmt: skip
_DINO: dict[str, Any] = {"intermediate_size": None, "mlp_ratio": 2}


def _timm_vit(pool: str = "token", **fields: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=5,
        mlp_ratio=HIDDEN / WIDTH, global_pool=pool, **fields,
    )  # fmt: skip


def _eva02() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(
        img_size=8, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=5,
        mlp_ratio=HIDDEN / WIDTH, qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(2, 2),
    )  # fmt: skip


def _open_clip_timm() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS}
    model = CustomTextCLIP(  # its own trunk is far too wide for a test
        embed_dim=16,
        vision_cfg={"timm_model_name": "vit_tiny_patch16_224", "image_size": 32},
        text_cfg={**text, "layers": LAYERS},
    )
    trunk = _timm_vit("map")
    trunk.reset_classifier(0, global_pool="map")  # type: ignore[operator]
    model.visual.trunk = trunk
    model.visual.head.proj = nn.Linear(WIDTH, 16, bias=False)
    return model  # type: ignore[no-any-return]


_PIXELS = ("pixel_values",)
MODELS: dict[str, Tiny] = {
    "vit": (_vit, ("pixel_values",)),
    "dinov2": (_dinov2, ("pixel_values",)),
    "clip": (_clip, ("input_ids", "attention_mask", "pixel_values")),
    "clip-vision": (_clip_vision, ("pixel_values",)),
    "open-clip": (_open_clip, ("image", "text")),
    "open-clip-custom-text": (functools.partial(_open_clip, True), ("image", "text")),
    "deit": (functools.partial(_transformers, "DeiT"), _PIXELS),
    "deit-teacher": (
        functools.partial(_transformers, "DeiT", "ForImageClassificationWithTeacher"), _PIXELS
    ),
    "vit-mae": (
        functools.partial(_transformers, "ViTMAE", "Model", mask_ratio=0.0), (*_PIXELS, "noise")
    ),
    "dinov2-registers": (
        functools.partial(_transformers, "Dinov2WithRegisters", "Model", **_DINO), _PIXELS
    ),
    "dinov2-swiglu": (
        functools.partial(_transformers, "Dinov2", "Model", use_swiglu_ffn=True, **_DINO), _PIXELS
    ),
    "beit": (functools.partial(_transformers, "Beit", use_relative_position_bias=True), _PIXELS),
    "swin": (functools.partial(_transformers, "Swin", **_SWIN), _PIXELS),
    "swinv2": (functools.partial(_transformers, "Swinv2", **_SWIN), _PIXELS),
    "siglip": (_siglip, ("input_ids", "pixel_values")),
    "timm-vit": (_timm_vit, ("x",)),
    "timm-vit-mean": (
        functools.partial(_timm_vit, "avg", init_values=0.5, class_token=False), ("x",)
    ),
    "timm-vit-pool": (functools.partial(_timm_vit, "map"), ("x",)),
    "eva02": (_eva02, ("x",)),
    "open-clip-timm": (_open_clip_timm, ("image", "text")),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("vit", "dinov2", "clip", "open-clip", "eva02")
#: Those of two towers; those with an attention pool of one block; those whose stages differ in
#: width, so that their streams have no row.
TWO = ("clip", "open-clip", "open-clip-custom-text", "siglip", "open-clip-timm")
POOLED = ("siglip", "timm-vit-pool", "open-clip-timm")
STAGED = ("swin", "swinv2")
#: Those whose gauges outside the blocks have no row.
INSIDE = (*STAGED, *POOLED, "deit-teacher")
#: Those that no library here writes as a folder.
NO_FOLDER = (
    "timm-vit", "timm-vit-mean", "timm-vit-pool", "eva02", "open-clip-timm",
)  # fmt: skip
#: Those that differ from another in little: the long tests leave them to CI.
KIN = (
    "deit-teacher", "vit-mae", "dinov2-registers", "swin", "timm-vit-mean", "timm-vit-pool",
    "open-clip-timm", "clip-vision", "open-clip-custom-text",
)  # fmt: skip
#: The Q/K gauge group of those where it is not the general one; those with a gated MLP.
RESTRICTED = {"swinv2": "sign", "eva02": "rotary"}
GATED = ("dinov2-swiglu", "eva02")
