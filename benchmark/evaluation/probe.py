"""Does a State compute the same function?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.core.errors import first_line
from benchmark.core.state import State, norm, task_vector
from benchmark.evaluation.accuracy import relative_gap
from benchmark.evaluation.inputs import random_inputs
from benchmark.io.folders import Checkpoint

log = logging.getLogger(__name__)

#: What a model may raise that asks for inputs of a kind of its own.
_UNKNOWN = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_OUTPUTS = ("logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")


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
    try:
        inputs = random_inputs(checkpoint, torch.Generator().manual_seed(seed))
        expected = outputs(checkpoint, reference, inputs) if inputs else None
    except _UNKNOWN as error:
        log.warning("outputs were not compared: %s", first_line(error))
        return None
    return None if expected is None else relative_gap(outputs(checkpoint, other, inputs), expected)


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
