"""How an expert is trained: the recipe, the loss, and LoRA's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmark.core.data import Split, Task
from benchmark.core.state import Forward, State, forward_of

Projection = Literal["q", "k", "v", "o"]
#: Learning rate of adapters, in units of the rate that suits all weights.
LORA_RATE = 10.0


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (arXiv 2106.09685). No dropout: the training loop has none anywhere."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[Projection, ...] = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise ValueError("LoRA needs rank >= 1, alpha > 0 and at least one target")


#: The logits (n, classes) of any State on the current batch.
Logits = Callable[[State], Tensor]


@dataclass(frozen=True)
class Batch:
    """The current batch of a training, for any State to be asked on it, differentiably.

    ``loss``: the testbed's own training loss of a State, a scalar. ``logits``: (n, classes) of a
    State, or (n, T, classes); ``labels``: what they should be. ``rng``: a generator for what the
    testbed's loss draws, which starts alike for every State that is asked.
    """

    examples: Split
    logits: Logits
    loss: Callable[[State], Tensor]
    rng: Callable[[], torch.Generator]

    @property
    def labels(self) -> Tensor:
        return self.examples.labels

    @classmethod
    def of(
        cls,
        task: Task,
        examples: Split,
        features: Forward,
        loss: Callable[[State, Batch], Tensor],
        rng: torch.Generator,
    ) -> Batch:
        """``examples`` of a testbed with this forward pass and this loss of its own.

        Draws from ``rng`` only where that loss does: without, trainings are as if there were no
        such thing.
        """
        seeds: list[int] = []

        def draws() -> torch.Generator:
            if not seeds:
                seeds.append(int(torch.randint(2**62, (), generator=rng)))
            return torch.Generator().manual_seed(seeds[0])

        def logits(state: State) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=examples.labels.is_cuda):
                found = forward_of(state, features)(state, examples.given)
            return task.logits(found.float())

        batch = cls(examples, logits, lambda state: loss(state, batch).float(), draws)
        return batch


def plain_loss(state: State, batch: Batch) -> Tensor:
    """Cross-entropy of the logits: the loss of a testbed that has no other."""
    return Task.loss(batch.logits(state), batch.labels)


#: (the current batch, the trained State, generator) → scalar loss.
#: Whatever it remembers between steps is lost when training resumes: draw from the generator only.
Loss = Callable[[Batch, State, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up, then linear or cosine decay to zero.

    ``frozen``: name prefixes of tensors that are not trained. ``clip``: gradient norm, or None.
    ``lora``: train adapters on the attention blocks instead of the tensors themselves.
    """

    steps: int = 80
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float | None = 1.0
    frozen: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["linear", "cosine"] = "linear"
    lora: Lora | None = None

    def rate(self, step: int) -> float:
        """The factor on the learning rate before step ``step`` (from 0): up, then down to zero."""
        up = (step + 1) / (self.warmup + 1)
        down = (self.steps - step) / max(self.steps - self.warmup, 1)
        if self.schedule == "cosine":
            down = 0.5 - 0.5 * math.cos(math.pi * max(0.0, min(down, 1.0)))
        return max(0.0, min(up, down, 1.0))

    def adapted(self, lora: Lora | None) -> Recipe:
        """The same on adapters, or on the tensors themselves.

        Adapters want ten times the learning rate (Trap², arXiv 2601.21898, uses thirty).
        """
        before, after = (LORA_RATE if given else 1.0 for given in (self.lora, lora))
        return replace(self, lora=lora, learning_rate=self.learning_rate * after / before)

    def shortened(self, steps: int, batch_size: int) -> Recipe:
        """The same for ``steps`` on few examples; at most a quarter of them is warm-up."""
        warmup = min(self.warmup, steps // 4)
        return replace(self, steps=steps, batch_size=batch_size, warmup=warmup)


def plain(batch: Batch, state: State, rng: torch.Generator) -> Tensor:
    """The testbed's own loss."""
    return batch.loss(state)
