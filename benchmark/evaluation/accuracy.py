"""Logits of a State on a testbed's tasks: data stays on the device, models are never copied."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmark.api.contracts import Testbed
from benchmark.core.data import Task
from benchmark.core.errors import MethodError
from benchmark.core.state import PerTask, State, forward_of, to_device


class Evaluator:
    """Runs States of one testbed on one device.

    ``batch_size`` is in examples; it fixes the order of floating-point sums, so results are
    reproducible only at one batch size.
    """

    def __init__(self, testbed: Testbed, device: torch.device, batch_size: int = 0) -> None:
        self.testbed = testbed
        self.device = device
        self.batch_size = batch_size or (512 if device.type == "cpu" else 4096)
        self._tasks: dict[str, Task] = {}

    @cached_property
    def base(self) -> State:
        """The public base on the device; its order of keys is that of every State here."""
        base = self.testbed.base()
        return to_device(dict(sorted(base.items())), self.device)

    def task(self, name: str) -> Task:
        """A task with its tensors on the device."""
        if name not in self._tasks:
            self._tasks[name] = self.testbed.task(name).to(self.device)
        return self._tasks[name]

    @torch.inference_mode()
    def logits(self, state: State, task: str, split: str, rows: range) -> Tensor:
        """Logits (len(rows), classes) float32 on the CPU.

        Raises:
            MethodError: a logit is NaN or infinite (a broken model is an error, not a low score).
        """
        what = self.task(task)
        examples = what.split(split)[slice(rows.start, rows.stop)]
        if isinstance(state, PerTask):
            state = state.of(task)
        forward = forward_of(state, self.testbed.features)
        parts = []
        for start in range(0, len(examples), self.batch_size):
            batch = examples[slice(start, start + self.batch_size)]
            parts.append(what.logits(forward(state, batch.inputs)))
        out = torch.cat(parts).float().cpu()  # one synchronisation for all batches
        if not torch.isfinite(out).all():
            raise MethodError(f"the model gives NaN or infinite logits on {task}")
        return out

    def correct(self, state: State, task: str, split: str, rows: range) -> np.ndarray:
        """Which examples are classified correctly: (len(rows),) bool."""
        return self.outcomes(self.logits(state, task, split, rows), task, split, rows)

    def outcomes(self, logits: Tensor, task: str, split: str, rows: range) -> np.ndarray:
        """The same from logits."""
        labels = self.task(task).split(split).labels[rows.start : rows.stop].cpu()
        return (logits.argmax(dim=1) == labels).numpy()


def relative_gap(logits: Tensor, reference: Tensor) -> float:
    """max |Δlogit| / max |logit|, the measure of exact equivalence (METHODS section 1)."""
    return float((logits - reference).abs().max() / reference.abs().max())
