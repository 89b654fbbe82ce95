"""What honest users do to a release: State → State. Nothing here knows of a defense.

``bf16`` is :func:`benchmark.core.state.rounded`. The others:

    int8:    ŵ = s_w · round(w / s_w),            s_w = max |row| / 127.5    (per output row)
             x̂ = s_x · (round(x / s_x + z) − z),  s_x = (max − min) / 127    (per call)
    int4:    ŵ = d · round((w − m) / d) + m,      m = min, d = (max − min) / 15  (32 of a row)
    pruned:  the 20 % smallest |w| of every weight matrix ← 0
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.api.recipe import Lora, Recipe
from benchmark.core.state import ForeignState, Forward, State, forward_of, rounded

__all__ = ["USES", "adapting", "int4", "int8", "pruned", "rounded"]

#: Measured on the victim's own task, then (the last two) on the task a user adapts the model to.
USES = ("bf16", "int8", "int4", "pruned", "fine-tuned", "lora")

PRUNED = 0.2
#: The share of the testbed's steps that a short fine-tune takes.
SHORT = 4

# torch's x86 kernels keep activations to 7 bits, lest pairs of products overflow 16.
_ACTIVATION_LEVELS = 127
_WEIGHT_LEVELS = 127.5


def int8(state: State, module: nn.Module, features: Forward) -> State:
    """``state`` after dynamic int8 quantisation of its Linears, run with quantised activations.

    The arithmetic of ``torch.ao.quantization.quantize_dynamic`` on x86 under its
    ``per_channel_dynamic_qconfig``, in floating point on the quantised values: torch's own needs
    modules that own integer weights (ours are lent a State), runs on CPUs only, and is announced
    to go. What is modelled: rounding and clipping of weights and activations; products and sums
    differ from int32 arithmetic by float32 rounding only. What is not: speed and size. As there,
    only modules of type ``nn.Linear`` itself are quantised: not embeddings, convolutions, GPT-2's
    Conv1D nor the projections inside ``nn.MultiheadAttention``. A range is that of one call, so
    outcomes depend (a little) on the batch, as torch's do.

    ``module``: the architecture that ``features`` runs (its weights are not looked at).
    """
    linears = {
        f"{name}.weight": part for name, part in module.named_modules() if type(part) is nn.Linear
    }
    quantised = {key: part for key, part in linears.items() if key in state}
    tensors = {k: _rows(v) if k in quantised else v for k, v in state.items()}
    run = forward_of(state, features)

    def forward(own: State, inputs: Mapping[str, Tensor]) -> Tensor:
        with ExitStack() as stack:
            for part in quantised.values():
                stack.callback(part.register_forward_pre_hook(_enter).remove)
            return run(own, inputs)

    return ForeignState(tensors, forward)


def _enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _activations(args[0]), *args[1:]


def _rows(weight: Tensor) -> Tensor:
    """(out, in), each row on its own grid of 256 values around 0."""
    eps = torch.finfo(torch.float32).eps
    scale = (weight.abs().amax(dim=1, keepdim=True) / _WEIGHT_LEVELS).clamp(min=eps)
    # Times 1 / scale, as torch does: a row's largest entry lies halfway between two values.
    return (weight * (1 / scale)).round().clamp(-128, 127) * scale


def _activations(values: Tensor) -> Tensor:
    """On one grid of 128 values from the least to the greatest; 0 is always on it."""
    if not values.numel():
        return values
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    scale = (high - low) / _ACTIVATION_LEVELS
    scale = torch.where(scale > 0, scale, torch.full_like(scale, 0.1))
    zero = (-low / scale).round()
    return ((values * (1 / scale) + zero).round().clamp(0, 255) - zero) * scale


def int4(state: State) -> State:
    """``state`` after a round trip through Q4_1, the 4-bit format of GGUF files.

    Every matrix whose rows are whole blocks of 32, embeddings too; d and m are float16. The
    arithmetic is that of the package ``gguf``.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    out, kind = dict(state), GGMLQuantizationType.Q4_1
    for key, value in state.items():
        if value.is_floating_point() and value.ndim == 2 and value.shape[1] % 32 == 0:
            stored = quantize(value.float().cpu().numpy(), kind)
            out[key] = torch.from_numpy(dequantize(stored, kind)).to(value)
    return ForeignState(out, state.forward) if isinstance(state, ForeignState) else out


def pruned(state: State, share: float = PRUNED) -> State:
    """``state`` with the ``share`` smallest entries of every tensor of two or more dimensions 0."""
    out = dict(state)
    for key, value in state.items():
        if value.is_floating_point() and value.ndim > 1:
            flat = value.flatten().clone()
            least = flat.abs().topk(int(share * flat.numel()), largest=False, sorted=False).indices
            flat[least] = 0
            out[key] = flat.view_as(value)
    return ForeignState(out, state.forward) if isinstance(state, ForeignState) else out


def adapting(recipe: Recipe, lora: bool) -> Recipe:
    """A quarter of the testbed's own steps, on all weights or on LoRA adapters."""
    short = recipe.shortened(max(1, recipe.steps // SHORT), recipe.batch_size)
    return short.adapted(Lora() if lora else None)
