"""The part of a transformers model that makes features, taken out of what stands on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.state import State


def body_of(model: Any) -> tuple[nn.Module, str]:
    """The body of a model, and what its names begin with in the whole.

    Some encoder–decoders (T5) have their body's parts beside the head and no body; it is made of
    these parts, which it shares with the whole.
    """
    body: nn.Module = getattr(model, "base_model", model)
    if body is not model:
        return body, f"{model.base_model_prefix}."
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    if outputs is None or not getattr(config, "is_encoder_decoder", False):
        return model, ""
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModel.from_config(config)
    for name, part in model.named_children():
        if hasattr(made, name):
            setattr(made, name, part)
    return made.eval().requires_grad_(False), ""


def tied(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several → the first."""
    first: dict[int, str] = {}
    found = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(value), name) != name:
            found[name] = first[id(value)]
    return found


def floats(module: nn.Module) -> State:
    """The tensors of a module in float32; those that are tied under their first name."""
    further = tied(module)
    return {
        key: value.detach().float() if value.is_floating_point() else value.detach()
        for key, value in module.state_dict().items()
        if key not in further
    }


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that no State brings."""
    kept = module.state_dict().keys()
    return {k: v.detach().clone() for k, v in module.named_buffers() if k not in kept}


def to_meta(module: nn.Module) -> None:
    """Take the storage from a module. What was tied stays so, which moving it would undo."""
    again = tied(module)
    module.to("meta").float()
    tie(module, again)


def tie(module: nn.Module, further: Mapping[str, str]) -> None:
    """Make parameters one under several names (:func:`tied`)."""
    for name, first in further.items():
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._parameters[last] = module.get_parameter(first)
