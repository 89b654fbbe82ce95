"""Convolutional models."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from zoo.shape import (
    CONV_SIZE,
    LENGTH,
    VOCABULARY,
    Tiny,
)


def _convnext(v2: bool = False, bare: bool = False) -> nn.Module:
    import transformers

    name = "ConvNextV2" if v2 else "ConvNext"
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}{'Model' if bare else 'ForImageClassification'}")
    return model(config(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2, num_labels=5))  # type: ignore[no-any-return]


def _resnet(layer: str = "basic", bare: bool = False) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32] if layer == "basic" else [32, 64],
        depths=[2, 2],
        layer_type=layer,
        num_labels=5,
    )
    return ResNetModel(config) if bare else ResNetForImageClassification(config)


def _timm_resnet(deep: bool = False) -> nn.Module:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    if deep:
        stem: Any = {"stem_type": "deep", "stem_width": 8, "avg_down": True}
        return ResNet(Bottleneck, (1, 1, 2, 1), channels=(4, 4, 8, 8), num_classes=5, **stem)
    return ResNet(BasicBlock, (2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5)


def _timm_convnext(**fields: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 2), dims=(8, 8, 16, 16), num_classes=5, **fields)


_CLIPTEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2}


def _open_clip_resnet() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": CONV_SIZE}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg={**_CLIPTEXT, "layers": 1})


def _open_clip_convnext() -> nn.Module:
    from open_clip.model import CLIP

    model = CLIP(  # its own trunk is far too wide for a test
        embed_dim=16,
        vision_cfg={"timm_model_name": "convnext_atto", "image_size": CONV_SIZE},
        text_cfg={**_CLIPTEXT, "layers": 1},
    )
    trunk = _timm_convnext()
    trunk.reset_classifier(0)  # type: ignore[operator]
    model.visual.trunk = trunk
    model.visual.head.proj = nn.Linear(16, 16, bias=False)
    return model


MODELS: dict[str, Tiny] = {
    "convnext": (_convnext, ("pixel_values",)),
    "convnext-bare": (functools.partial(_convnext, bare=True), ("pixel_values",)),
    "convnextv2": (functools.partial(_convnext, v2=True), ("pixel_values",)),
    "resnet": (_resnet, ("pixel_values",)),
    "resnet-bare": (functools.partial(_resnet, bare=True), ("pixel_values",)),
    "resnet-bottleneck": (functools.partial(_resnet, "bottleneck"), ("pixel_values",)),
    "timm-convnext": (_timm_convnext, ("x",)),
    "timm-convnextv2": (
        functools.partial(_timm_convnext, use_grn=True, ls_init_value=None, conv_mlp=True),
        ("x",),
    ),
    "timm-resnet": (_timm_resnet, ("x",)),
    "timm-resnet-deep": (functools.partial(_timm_resnet, True), ("x",)),
    "open-clip-resnet": (_open_clip_resnet, ("image", "text")),
    "open-clip-convnext": (_open_clip_convnext, ("image", "text")),
}
