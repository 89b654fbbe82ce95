"""Vision transformers and CLIP."""

from __future__ import annotations

import functools

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


MODELS: dict[str, Tiny] = {
    "vit": (_vit, ("pixel_values",)),
    "dinov2": (_dinov2, ("pixel_values",)),
    "clip": (_clip, ("input_ids", "attention_mask", "pixel_values")),
    "clip-vision": (_clip_vision, ("pixel_values",)),
    "open-clip": (_open_clip, ("image", "text")),
    "open-clip-custom-text": (functools.partial(_open_clip, True), ("image", "text")),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("vit", "dinov2", "clip", "open-clip")
