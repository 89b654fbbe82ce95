"""The one fine-tuning loop: experts, training-time defenses, and attacks that fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from benchmark.api.recipe import Batch, Loss, Recipe, plain
from benchmark.core.data import Split, Task
from benchmark.core.state import State, statistic
from benchmark.learn.adapters import Adapters
from benchmark.learn.batches import Batches
from benchmark.learn.snapshots import Snapshots, interruptible

if TYPE_CHECKING:
    from benchmark.api.contracts import Testbed


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
    loss = loss or plain
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
        (_with_head(tasks[name], device), Batches(split.to(device), recipe.batch_size, rng))
        for name, split in sorted(examples.items())
    ]

    def advance(step: int) -> None:
        task, stream = streams[step % len(streams)]
        batch = Batch.of(task, stream.draw(), testbed.features, testbed.loss, rng)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(batch, trained.state(), rng).backward()
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


def _with_head(task: Task, device: torch.device) -> Task:
    return replace(task, head=task.head.to(device))


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
