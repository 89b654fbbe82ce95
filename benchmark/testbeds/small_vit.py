"""A small vision transformer without storage, for testbeds that train their own base."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmark.core.state import State


@functools.cache
def skeleton(
    *, width: int, layers: int, heads: int, side: int, patch: int, channels: int
) -> torch.nn.Module:
    """transformers' ViT on the meta device: States are lent to it one call at a time. One object
    for equal arguments."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        image_size=side,
        patch_size=patch,
        num_channels=channels,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        return ViTModel(config, add_pooling_layer=False).eval()


def initialise(
    module: torch.nn.Module, rng: torch.Generator, small: Callable[[str], bool]
) -> State:
    """Normal weights of variance 1/fan-in, of deviation 0.02 where ``small`` says so of a name;
    zero biases, unit LayerNorm gains."""
    out = {}
    for key, value in module.state_dict().items():
        fresh = torch.zeros(value.shape)
        if "layernorm" in key and key.endswith("weight"):
            fresh.fill_(1.0)
        elif not key.endswith("bias"):
            std = 0.02 if small(key) else value[0].numel() ** -0.5
            fresh = torch.randn(value.shape, generator=rng) * std
        out[key] = fresh
    return out
