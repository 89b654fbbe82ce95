"""Tiny random models of every supported family, for property tests.

The weights are ten times larger than transformers' initialisation and no bias is zero, so that a
transform that breaks the function shows; dh/d = 1/8, below which per-head least squares does not
erase the task vector (METHODS section 3, trap 1).

    model, inputs = tiny("vit")
    state = state_of(model)            # a State, independent of the model
    out = outputs(model, state, inputs)  # (n, m): all that the model computes, a row per example
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmark.core.state import State
from zoo import audio, convolutional, crossing, decoders, diffusion, encoders, vision
from zoo.shape import (
    BATCH,
    CONV_SIZE,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    LENGTH,
    TOKENS,
    VOCABULARY,
    WIDTH,
)

__all__ = ["BATCH", "HEADS", "HIDDEN", "LAYERS", "LENGTH", "TOKENS", "VOCABULARY", "WIDTH"]

#: METHODS section 1: max |Δlogit| relative to the largest logit, float32.
TOLERANCE = 1e-4
_MODELS = {**encoders.MODELS, **vision.MODELS, **decoders.MODELS, **crossing.MODELS, **audio.MODELS}
#: Models with channels, most of them without attention.
CONVOLUTIONAL: tuple[str, ...] = tuple(convolutional.MODELS)
#: Generators of images, by diffusers.
DIFFUSION: tuple[str, ...] = tuple(diffusion.MODELS)

#: Every model, and one model per family (the rest differ in their prefixes only).
NAMES: tuple[str, ...] = tuple(_MODELS)
FAMILIES: tuple[str, ...] = (
    *encoders.FAMILIES, *vision.FAMILIES, *decoders.FAMILIES, *crossing.FAMILIES,
    *audio.FAMILIES,
)  # fmt: skip
#: Those that are like another but for a head, a norm or a class of their own: left out of the
#: default run of long tests.
KIN: frozenset[str] = frozenset((*crossing.KIN, *audio.KIN, *decoders.KIN, *vision.KIN))
#: The Q/K gauge group of those where it is not the general one.
RESTRICTED = {**decoders.RESTRICTED, **encoders.RESTRICTED, **vision.RESTRICTED}
#: Those with fewer KV heads than heads; those with a gated MLP.
GROUPED = decoders.GROUPED
GATED = (*decoders.GATED, *crossing.GATED, *vision.GATED, *encoders.GATED)
#: Those whose gauges outside the blocks have no row.
INSIDE = (*decoders.MIXTURES, *encoders.INSIDE, *vision.INSIDE, "open-clip-resnet")
#: Those of which an encoder and a decoder have ``LAYERS`` each, and how wide the encoder is.
CROSSING = dict.fromkeys((*crossing.MODELS, *audio.CROSSING), WIDTH) | crossing.WIDTHS


def examples() -> dict[str, Tensor]:
    """Inputs of every kind."""
    return _examples(generator(0), IMAGE["image_size"])


def _examples(rng: torch.Generator, size: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH), generator=rng)
    tokens[:, -1] = 1  # CLIP pools at the end-of-text token
    mask = torch.ones_like(tokens)
    images = torch.randn(BATCH, 3, size, size, generator=rng)
    text = tokens.clone()
    text[:, -1] = VOCABULARY - 1  # open_clip pools at the largest token
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "decoder_input_ids": tokens.flip(1),
        "pixel_values": images,
        "image": images,
        "x": images,
        "noise": torch.zeros(BATCH, 4),
        "text": text,
        "input_features": torch.randn(BATCH, audio.BANDS, audio.FRAMES, generator=rng),
        "input_values": torch.randn(BATCH, 128, generator=rng),
    }


@functools.cache
def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model ``name`` in evaluation mode and inputs for it. Shared between tests: never edit."""
    build, wanted = {**_MODELS, **convolutional.MODELS, **diffusion.MODELS}[name]
    model = build().eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, value in model.named_parameters():
        if value.ndim == 0:  # CLIP's logit scale
            continue
        noise = torch.randn(value.shape, generator=rng)
        gain = any(part in key.lower() for part in ("norm", "ln_")) and "weight" in key
        gain |= bool(re.search(r"lambda_?\d|ls\d\.gamma", key))  # layer scales
        if name in convolutional.MODELS and value.ndim == 1 and key.endswith(("weight", "gamma")):
            gain = True  # of a norm that is called bn1, downsample.1 or stem.1
        value.copy_(1 + 0.1 * noise if gain else 0.2 * noise)
    for key, value in model.named_buffers():
        noise = torch.randn(value.shape, generator=rng)
        if key.endswith("running_mean"):
            value.copy_(0.5 * noise)
        elif key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=rng))
        elif key.endswith("num_batches_tracked"):
            value.fill_(7)
    if not isinstance(wanted, tuple):
        return model, wanted(rng)
    examples = _examples(rng, CONV_SIZE if name in convolutional.MODELS else IMAGE["image_size"])
    return model, {key: examples[key] for key in wanted}


def state_of(model: nn.Module) -> State:
    """The model's State, sharing no memory with it."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def untied(model: nn.Module) -> State:
    """:func:`state_of` with tied weights under their first name only, as files hold them."""
    first: dict[int, str] = {}
    for key, value in model.state_dict().items():
        first.setdefault(value.data_ptr(), key)
    state = state_of(model)
    return {key: state[key] for key in first.values()}


def outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model answers for each example, side by side: (n, m).

    What its heads give, where it has heads: the hidden states beside them are no answer, and a
    gauge of the stream changes them. Else everything it computes.
    """
    with torch.no_grad():
        result = torch.func.functional_call(
            model, dict(state), kwargs=dict(inputs), tie_weights=False
        )
    if isinstance(result, Mapping):
        heads = [result[k] for k in ("logits", "image_embeds", "text_embeds") if k in result]
        result = heads or list(result.values())
    values = result
    values = [values] if isinstance(values, Tensor) else values
    return torch.cat(
        [v.reshape(BATCH, -1) for v in values if isinstance(v, Tensor) and v.numel() >= BATCH],
        dim=1,
    )


def drift(model: nn.Module, a: State, b: State, inputs: Mapping[str, Tensor]) -> float:
    """max |Δoutput| between two States, relative to the largest output of ``a``."""
    reference = outputs(model, a, inputs)
    change = outputs(model, b, inputs) - reference
    return float(change.abs().max() / reference.abs().max())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def invertible(heads: int, size: int, rng: torch.Generator, condition: float = 1e2) -> Tensor:
    """Random matrices U·diag(s)·Vᵀ with the given condition number: (heads, size, size) float64."""
    u, v = (
        torch.linalg.qr(torch.randn(heads, size, size, generator=rng, dtype=torch.float64))[0]
        for _ in range(2)
    )
    spectrum = torch.logspace(0, 1, size, base=condition, dtype=torch.float64) / condition**0.5
    return u @ torch.diag(spectrum) @ v.mT


def perturbed(state: State, relative: float, seed: int) -> State:
    """``state`` plus a random task vector of ``relative`` size in every tensor."""
    rng = generator(seed)
    out = {}
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=rng)
            out[key] = value + relative * value.square().mean().sqrt() * noise
        else:
            out[key] = value
    return out
