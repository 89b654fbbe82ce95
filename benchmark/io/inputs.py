"""Random valid inputs of any loaded folder, by its configuration, and what it makes of them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.errors import brief
from benchmark.io.folders import Checkpoint
from benchmark.io.noise import noise_inputs

log = logging.getLogger(__name__)

#: What a model may raise that asks for inputs of a kind of its own.
_UNKNOWN = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_OUTPUTS = ("logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")
_LENGTH = 16
#: Pixels a side where the configuration sets none, as of convolutional models.
_SIDE = 64
#: What configurations of several parts call the one that sees, hears, reads or writes.
_EYES = ("vision_config", "encoder", "backbone_config")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


def valid_inputs(checkpoint: Checkpoint, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs that the model runs on; empty, and said so, where it asks for others."""
    try:
        inputs = random_inputs(checkpoint, torch.Generator().manual_seed(seed))
        if inputs:
            with torch.inference_mode():
                outputs(checkpoint.model, inputs)
    except _UNKNOWN as error:
        log.warning("outputs were not compared: %s", brief(error))
        return {}
    return inputs


def outputs(
    model: nn.Module, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Logits, or features where the model has no head, of its own weights or those of a State.

    (n, m) float32 on the CPU. Half-precision weights are computed with in float32, so that only
    what is stored counts.
    """
    held = dict(model.state_dict()) if state is None else state
    device = next(iter(held.values())).device
    model = model.float().to(device)
    arguments = {key: _on(value, device) for key, value in inputs.items()}
    if state is None:
        result = model(**arguments)
    else:
        wide = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        result = torch.func.functional_call(model, wide, kwargs=arguments)
    if isinstance(result, Mapping):
        named = [result[key] for key in _OUTPUTS if result.get(key) is not None][:1]
    else:
        named = list(result)
    values = named or list(result.values())
    n = len(next(iter(inputs.values())))
    kept = [v for v in values if isinstance(v, Tensor) and v.ndim > 1 and len(v) == n]
    return torch.cat([v.reshape(n, -1) for v in kept], dim=1).float().cpu()


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _on(part, device) for key, part in value.items()}
    return value.to(device)


def random_inputs(
    checkpoint: Checkpoint, rng: torch.Generator, examples: int = 8
) -> dict[str, Tensor]:
    """Token ids (n, length), pixels (n, c, h, w), spectra (n, bins, frames), waves (n, samples);
    for a generator of images noise, times and what it is told.

    Empty where the model takes none of them.
    """
    if checkpoint.kind == "diffusers":
        return noise_inputs(checkpoint.model, rng)
    if checkpoint.kind == "open_clip":
        return _open_clip_inputs(checkpoint.model, rng, examples)
    model = checkpoint.model
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    inputs = {}
    if "pixel_values" in arguments:
        vision = next((part for n in _EYES if (part := getattr(config, n, None))), config)
        size = getattr(vision, "image_size", None) or _SIDE
        inputs["pixel_values"] = _pixels(getattr(vision, "num_channels", 3), size, rng, examples)
        if "noise" in arguments:  # that ViTMAE masks by
            patches = (size // vision.patch_size) ** 2
            inputs["noise"] = torch.rand(examples, patches, generator=rng)
    for name in {"input_features", "input_values"} & arguments.keys():
        inputs[name] = torch.randn(examples, *_sound(config), generator=rng)
    if "input_ids" in arguments:
        tokens = _tokens(config, "encoder", model, rng, examples)
        if "pixel_values" in inputs:
            tokens = _with_image_tokens(model, tokens, inputs["pixel_values"])
        inputs["input_ids"] = tokens
        if "attention_mask" in arguments:
            inputs["attention_mask"] = torch.ones_like(tokens)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = _tokens(config, "decoder", model, rng, examples)
    return inputs


def _tokens(
    config: Any, part: str, model: nn.Module, rng: torch.Generator, examples: int
) -> Tensor:
    """Random ordinary tokens; the last is the end-of-text token, at which CLIP pools."""
    named = getattr(config, part, None) or getattr(config, "text_config", None)
    config = named if named is not None and not isinstance(named, str) else config
    special = {
        getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")
    }
    special |= {getattr(model.config, name, None) for name in _IMAGE_TOKENS}
    ids = {int(i) for s in special if s is not None for i in (s if isinstance(s, list) else [s])}
    ordinary = torch.tensor(sorted(set(range(_vocabulary(config, model))) - ids))
    # Two positions fewer: RoBERTa numbers them from pad_token_id + 1.
    room = (getattr(config, "max_position_embeddings", None) or _LENGTH + 2) - 2
    length = max(2, min(_LENGTH, room))
    tokens = ordinary[torch.randint(len(ordinary), (examples, length), generator=rng)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < _vocabulary(config, model):
        tokens[:, -1] = end
    return tokens


def _vocabulary(config: Any, model: Any) -> int:
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else int(model.get_input_embeddings().num_embeddings)


def _with_image_tokens(model: Any, tokens: Tensor, pixels: Tensor) -> Tensor:
    """The text behind as many image tokens as an image has features, where the model asks."""
    token = next(
        (t for n in _IMAGE_TOKENS if (t := getattr(model.config, n, None)) is not None), None
    )
    if token is None:
        return tokens
    count = getattr(model.config, "num_query_tokens", None)  # BLIP-2's
    if count is None:
        with torch.inference_mode():
            found = model.get_image_features(pixel_values=pixels[:1].to(model.dtype))
        found = getattr(found, "pooler_output", found)
        parts = found if isinstance(found, (list, tuple)) else [found]
        count = sum(part.numel() // part.shape[-1] for part in parts)
    return torch.cat([torch.full((len(tokens), count), token), tokens], dim=1)


def _sound(config: Any) -> tuple[int, ...]:
    """Whisper: (bins, frames); AST: (frames, bins); wav2vec2: (samples,)."""
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None and (frames := getattr(config, "max_source_positions", None)):
        return bins, 2 * frames  # its second convolution has stride 2
    if bins is not None:
        return config.max_length, bins
    strides = torch.tensor(getattr(config, "conv_stride", (1,)))
    return (_LENGTH * int(strides.prod()) + sum(getattr(config, "conv_kernel", ())),)


def _pixels(channels: int, size: Any, rng: torch.Generator, examples: int) -> Tensor:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(examples, channels, height, width, generator=rng)


def _open_clip_inputs(model: Any, rng: torch.Generator, examples: int) -> dict[str, Tensor]:
    text = getattr(model, "text", model)
    length = int(model.context_length)
    tokens = torch.randint(1, int(text.vocab_size) - 1, (examples, length), generator=rng)
    tokens[:, -1] = int(text.vocab_size) - 1  # open_clip pools at the largest token
    return {"image": _pixels(3, model.visual.image_size, rng, examples), "text": tokens}
