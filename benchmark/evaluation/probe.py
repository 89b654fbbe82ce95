"""Does a State compute the same function? Random valid inputs for any loaded folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.core.state import State, norm, task_vector
from benchmark.evaluation.accuracy import relative_gap
from benchmark.io.folders import Checkpoint

_LENGTH = 16
_OUTPUTS = ("logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")


def random_inputs(
    checkpoint: Checkpoint, rng: torch.Generator, examples: int = 8
) -> dict[str, Tensor]:
    """Valid inputs of the model by its config: token ids (n, length) and/or pixels (n, c, h, w).

    Empty where the model takes neither.
    """
    if checkpoint.kind == "open_clip":
        return _open_clip_inputs(checkpoint.model, rng, examples)
    config: Any = checkpoint.model.config
    arguments = inspect.signature(checkpoint.model.forward).parameters
    inputs = {}
    if "pixel_values" in arguments:
        vision = getattr(config, "vision_config", None) or config
        inputs["pixel_values"] = _pixels(
            getattr(vision, "num_channels", 3), vision.image_size, rng, examples
        )
    if "input_ids" in arguments:
        text = getattr(config, "text_config", None) or config
        inputs["input_ids"] = tokens = _tokens(text, rng, examples)
        if "attention_mask" in arguments:
            inputs["attention_mask"] = torch.ones_like(tokens)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens
    return inputs


def outputs(checkpoint: Checkpoint, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of ``state``, or features where the model has no head: (n, m) float32.

    Half-precision weights are computed with in float32, so that only what is stored counts.
    """
    device = next(iter(state.values())).device
    model = checkpoint.model.float().to(device)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    arguments = {key: value.to(device) for key, value in inputs.items()}
    with torch.inference_mode():
        result = torch.func.functional_call(model, wide, kwargs=arguments)
    if isinstance(result, Mapping):
        named = [result[key] for key in _OUTPUTS if result.get(key) is not None][:1]
    else:
        named = list(result)
    values = named or list(result.values())
    n = len(next(iter(inputs.values())))
    kept = [v for v in values if isinstance(v, Tensor) and v.ndim > 1 and len(v) == n]
    return torch.cat([v.reshape(n, -1) for v in kept], dim=1).float().cpu()


def gap(checkpoint: Checkpoint, reference: State, other: State, seed: int = 0) -> float | None:
    """max |Δlogit| / max |logit| on random inputs, or None where the model takes none we know."""
    inputs = random_inputs(checkpoint, torch.Generator().manual_seed(seed))
    if not inputs:
        return None
    return relative_gap(outputs(checkpoint, other, inputs), outputs(checkpoint, reference, inputs))


def relative_distance(state: State, base: State, anatomy: Anatomy | None) -> float:
    """‖θ − θ0‖ / ‖θ0‖ without the key biases that softmax ignores (METHODS section 3, trap 0)."""
    pair = dict(state), dict(base)
    for block in anatomy.attention if anatomy else ():
        if block.k.bias is not None and block.qk_gauge == "general":
            for member in pair:
                bias = block.k.bias.read(member)
                block.k.bias.write(member, torch.zeros_like(bias))
    floating = {key: value for key, value in pair[1].items() if value.is_floating_point()}
    return norm(task_vector(*pair)) / norm(floating)


def _tokens(config: Any, rng: torch.Generator, examples: int) -> Tensor:
    """Random ordinary tokens; the last is the end-of-text token, at which CLIP pools."""
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = {int(i) for s in special if s is not None for i in (s if isinstance(s, list) else [s])}
    ordinary = torch.tensor(sorted(set(range(config.vocab_size)) - ids))
    # Two positions fewer: RoBERTa numbers them from pad_token_id + 1.
    room = (getattr(config, "max_position_embeddings", None) or _LENGTH + 2) - 2
    length = max(2, min(_LENGTH, room))
    tokens = ordinary[torch.randint(len(ordinary), (examples, length), generator=rng)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        tokens[:, -1] = end
    return tokens


def _pixels(channels: int, size: Any, rng: torch.Generator, examples: int) -> Tensor:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(examples, channels, height, width, generator=rng)


def _open_clip_inputs(model: Any, rng: torch.Generator, examples: int) -> dict[str, Tensor]:
    text = getattr(model, "text", model)
    length = int(model.context_length)
    tokens = torch.randint(1, int(text.vocab_size) - 1, (examples, length), generator=rng)
    tokens[:, -1] = int(text.vocab_size) - 1  # open_clip pools at the largest token
    return {"image": _pixels(3, model.visual.image_size, rng, examples), "text": tokens}
