"""The one fine-tuning loop: experts, training-time defenses, and attacks that fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

    def rate(self, step: int) -> float:
        """The factor on the learning rate before step ``step`` (from 0): up, then down to zero."""
        up = (step + 1) / (self.warmup + 1)
        down = (self.steps - step) / max(self.steps - self.warmup, 1)
        return max(0.0, min(up, down, 1.0))


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
    the frozen heads; ``progress(step, steps)`` is called after every step. Tensors that are not
    trained are shared with ``start``, which is never written to.
    """
    recipe = recipe or testbed.recipe
    loss = loss or cross_entropy
    device = next(iter(start.values())).device
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in start.items()
        if value.is_floating_point() and not key.startswith(recipe.frozen)
    }
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    streams = [
        (tasks[name], _batches(split.to(device), recipe.batch_size, rng))
        for name, split in sorted(examples.items())
    ]
    heads = {task.name: task.head.to(device) for task, _ in streams}
    trained: State = {**start, **leaves}

    def advance(step: int) -> None:
        task, stream = streams[step % len(streams)]
        batch = next(stream)

        def logits(state: State, task: Task = task, batch: Split = batch) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                features = testbed.features(state, batch.inputs)
            return task.scale * features.float() @ heads[task.name].T

        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(logits, trained, batch.labels, rng).backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), recipe.clip)
        optimizer.step()
        schedule.step()

    with at_most(testbed.threads):
        for step in range(recipe.steps):
            advance(step)
            if progress is not None:
                progress(step + 1, recipe.steps)
    return {**start, **{key: value.detach() for key, value in leaves.items()}}


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Limit torch's CPU threads meanwhile: on small matrices they wait for each other, not work."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(split: Split, size: int, rng: torch.Generator) -> Iterator[Split]:
    """Endless batches, reshuffled every epoch; a split smaller than ``size`` is one batch."""
    while True:
        order = torch.randperm(len(split), generator=rng).to(split.labels.device)
        # The short last batch is dropped: its rows come up again in the next epoch.
        for start in range(0, max(len(split) - size, 0) + 1, size):
            yield split[order[start : start + size]]
