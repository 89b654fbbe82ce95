"""Does a State compute the same function?"""

from __future__ import annotations

import torch

from benchmark.anatomy import Anatomy
from benchmark.core.state import State, norm, task_vector
from benchmark.evaluation.accuracy import relative_gap
from benchmark.io.folders import Checkpoint
from benchmark.io.inputs import outputs, valid_inputs


def gap(checkpoint: Checkpoint, reference: State, other: State, seed: int = 0) -> float | None:
    """max |Δlogit| / max |logit| on random inputs, or None where the model takes none we know."""
    inputs = valid_inputs(checkpoint, seed)
    if not inputs:
        return None
    with torch.inference_mode():
        return relative_gap(
            *(outputs(checkpoint.model, inputs, state) for state in (other, reference))
        )


def relative_distance(state: State, base: State, anatomy: Anatomy | None) -> float:
    """‖θ − θ0‖ / ‖θ0‖ without the key biases that softmax ignores (METHODS section 3, trap 0)."""
    pair = dict(state), dict(base)
    for block in anatomy.attention if anatomy else ():
        if block.k.bias is not None and block.free_key_bias and block.joint is None:
            for member in pair:
                bias = block.k.bias.read(member)
                block.k.bias.write(member, torch.zeros_like(bias))
    floating = {key: value for key, value in pair[1].items() if value.is_floating_point()}
    return norm(task_vector(*pair)) / norm(floating)
