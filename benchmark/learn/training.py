"""The one fine-tuning loop: experts, training-time defenses, and attacks that fine-tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from benchmark.core.data import Split, Task
from benchmark.core.state import State, forward_of, statistic
from benchmark.learn.adapters import LORA_RATE, Adapters, Lora
from benchmark.learn.snapshots import Snapshots, interruptible

if TYPE_CHECKING:
    from benchmark.api.contracts import Testbed

#: The logits (n, classes) of any State on the current batch.
Logits = Callable[[State], Tensor]

#: (logits of any State on the current batch, trained State, labels, generator) → scalar loss.
#: Whatever it remembers between steps is lost when training resumes: draw from the generator only.
Loss = Callable[[Logits, State, Tensor, torch.Generator], Tensor]


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


def cross_entropy(logits: Logits, state: State, labels: Tensor, rng: torch.Generator) -> Tensor:
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
    resume: Path | None = None,
) -> State:
    """Train ``start`` on ``examples`` (task name → examples; tasks alternate batch by batch).

    Deterministic under ``rng`` on one machine. The forward pass has no dropout. ``tasks`` supplies
    the frozen heads; ``progress(step, steps)`` is called after every step. Tensors that are not
    trained are shared with ``start``, which is never written to. So are the running statistics of
    batch norms, which run in evaluation mode: a task vector from here moves none of them.

    ``resume``: a file for this one training, kept up to date by
    :class:`benchmark.learn.snapshots.Snapshots`. A killed training that is called again with the
    same file and arguments continues and gives the same bits; once finished it is not repeated. The
    caller deletes the file.
    """
    recipe = recipe or testbed.recipe
    loss = loss or cross_entropy
    device = next(iter(start.values())).device
    snapshots = Snapshots(resume, (testbed, recipe, loss), start, examples, rng)
    trained: _Trained = (
        _Tensors(start, recipe.frozen)
        if recipe.lora is None
        else Adapters(start, testbed.anatomy(), recipe.lora, recipe.frozen, rng)
    )
    parameters = trained.parameters
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    streams = [
        (tasks[name], _Batches(split.to(device), recipe.batch_size, rng))
        for name, split in sorted(examples.items())
    ]
    heads = {task.name: task.head.to(device) for task, _ in streams}

    def advance(step: int) -> None:
        task, stream = streams[step % len(streams)]
        batch = stream.draw()

        def logits(state: State, task: Task = task, batch: Split = batch) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                features = forward_of(state, testbed.features)(state, batch.inputs)
            return task.scale * features.float() @ heads[task.name].T

        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(logits, trained.state(), batch.labels, rng).backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        optimizer.step()
        schedule.step()

    done = snapshots.restore(parameters, optimizer, schedule, [stream for _, stream in streams])
    with at_most(testbed.threads), interruptible(snapshots) as check:
        for step in range(done, recipe.steps):
            with snapshots.step(step, recipe.steps):
                advance(step)
            if progress is not None:
                progress(step + 1, recipe.steps)
            check()
    with torch.no_grad():
        return {k: v if v is start[k] else v.detach() for k, v in trained.state().items()}


class _Trained(Protocol):
    """What the optimizer moves, and the State it makes."""

    @property
    def parameters(self) -> dict[str, Tensor]: ...

    def state(self) -> State: ...


class _Tensors:
    """Every floating-point tensor of ``start`` whose name has no ``frozen`` prefix, except the
    running statistics of batch norms."""

    def __init__(self, start: State, frozen: tuple[str, ...]) -> None:
        self.parameters = {
            key: value.detach().clone().requires_grad_()
            for key, value in start.items()
            if value.is_floating_point() and not key.startswith(frozen) and not statistic(key)
        }
        self._state: State = {**start, **self.parameters}

    def state(self) -> State:
        return self._state


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Limit torch's CPU threads meanwhile: on small matrices they wait for each other, not work."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Batches:
    """Endless batches, reshuffled every epoch; a split smaller than ``size`` is one batch."""

    def __init__(self, split: Split, size: int, rng: torch.Generator) -> None:
        self._split, self._size, self._rng = split, size, rng
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self._sent = self.order, self.order

    def draw(self) -> Split:
        # The short last batch is dropped: its rows come up again in the next epoch.
        if not len(self.order) or self.position > max(len(self.order) - self._size, 0):
            self.order = torch.randperm(len(self._split), generator=self._rng)
            self.position = 0
        if self._sent[0] is not self.order:
            # One transfer per epoch: with one per batch the host would wait for the device.
            self._sent = self.order, self.order.to(self._split.labels.device)
        rows = self._sent[1][self.position : self.position + self._size]
        self.position += self._size
        return self._split[rows]
