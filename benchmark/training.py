"""The one fine-tuning loop: experts, training-time defenses, and attacks that fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmark.checkpoint import State
from benchmark.data import Split, Task

if TYPE_CHECKING:
    from benchmark.contracts import Testbed

#: (logits of any State on the current batch, trained State, labels, generator) → scalar loss.
Loss = Callable[[Callable[[State], Tensor], State, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and linear decay to zero.

    ``frozen``: name prefixes of tensors that are not trained. ``clip``: gradient norm, or None.
    """

    steps: int = 80
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float | None = 1.0
    frozen: tuple[str, ...] = ()


def cross_entropy(
    logits: Callable[[State], Tensor], state: State, labels: Tensor, rng: torch.Generator
) -> Tensor:
    """The plain loss."""
    return torch.nn.functional.cross_entropy(logits(state), labels)


def fine_tune(
    testbed: Testbed,
    tasks: Mapping[str, Task],
    start: State,
    examples: Mapping[str, Split],
    rng: torch.Generator,
    *,
    recipe: Recipe | None = None,
    loss: Loss | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> State:
    """Train ``start`` on ``examples`` (task name → examples; tasks alternate batch by batch).

    Deterministic under ``rng`` on one machine. The forward pass has no dropout. ``tasks`` supplies
    the frozen heads; ``progress(step, steps)`` is called after every step.
    """
    raise NotImplementedError
