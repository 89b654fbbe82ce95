"""Random inputs of a generator of images by diffusers, by its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: Latent pixels a side, and tokens of a text: a comparison needs no whole image.
_SIDE, _LENGTH = 16, 8
#: Numbers by which SDXL is told size and place of the image.
_TIME_IDS = 6


def noise_inputs(model: Any, rng: torch.Generator, examples: int = 2) -> dict[str, Any]:
    """Noise (n, c, h, w), or (n, tokens, c) where it is packed; times (n,); what it is told.

    Empty where the model takes neither.
    """
    config: Mapping[str, Any] = model.config
    arguments = inspect.signature(model.forward).parameters
    normal = partial(torch.randn, generator=rng)
    channels, tokens = config.get("in_channels", 4), _SIDE
    inputs: dict[str, Any] = {}
    if "img_ids" in arguments:
        inputs["hidden_states"] = normal(examples, tokens, channels)
        inputs["timestep"] = torch.rand(examples, generator=rng)
        places = torch.arange(float(tokens**0.5))
        inputs["img_ids"] = torch.cartesian_prod(torch.zeros(1), places, places)
        inputs["txt_ids"] = torch.zeros(_LENGTH, 3)
        if config.get("guidance_embeds"):
            inputs["guidance"] = torch.ones(examples)
    else:
        name = next((n for n in ("sample", "hidden_states") if n in arguments), None)
        if name is None:
            return {}
        side = min(_side(config.get("sample_size")), _SIDE)
        inputs[name] = normal(examples, channels, side, side)
        inputs["timestep"] = torch.randint(0, 1000, (examples,), generator=rng)
    text = _first(config, "encoder_hid_dim", "joint_attention_dim", "cross_attention_dim")
    if "encoder_hidden_states" in arguments and isinstance(text, int):
        inputs["encoder_hidden_states"] = normal(examples, _LENGTH, text)
    if "pooled_projections" in arguments:
        inputs["pooled_projections"] = normal(examples, config["pooled_projection_dim"])
    classes = _first(config, "num_class_embeds", "num_embeds_ada_norm")
    if "class_labels" in arguments and classes:
        inputs["class_labels"] = torch.randint(0, classes, (examples,), generator=rng)
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = _added(config, normal, examples)
    return inputs


def _added(config: Mapping[str, Any], normal: Any, examples: int) -> dict[str, Tensor]:
    times = _TIME_IDS * config["addition_time_embed_dim"]
    return {
        "text_embeds": normal(examples, config["projection_class_embeddings_input_dim"] - times),
        "time_ids": normal(examples, _TIME_IDS).abs(),
    }


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is set; of several stages the first."""
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _side(size: Any) -> int:
    return int(min(size) if isinstance(size, (list, tuple)) else size or _SIDE)
