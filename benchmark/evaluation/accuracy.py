"""Logits of a State on a testbed's tasks: data stays on the device, models are never copied."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmark.api.contracts import Testbed
from benchmark.core.data import Ask, Split, Task
from benchmark.core.errors import MethodError
from benchmark.core.state import PerTask, State, forward_of, to_device

#: Bytes of logits that are remembered: of a vocabulary hardly any, of classes those of many models.
_REMEMBERED = 2**26


class _Part(NamedTuple):
    """Rows ``start:stop`` of a split, run at once."""

    rows: Split
    start: int
    stop: int
    split: str


class Evaluator:
    """Runs States of one testbed on one device.

    Logits on test examples are remembered for models whose identity is told, the latest ones: a
    model is asked for its outcomes, for its gap to another, and as what others are compared with.

    ``batch_size`` is in examples; it fixes the order of floating-point sums, so results are
    reproducible only at one batch size.
    """

    def __init__(self, testbed: Testbed, device: torch.device, batch_size: int = 0) -> None:
        self.testbed = testbed
        self.device = device
        self.batch_size = batch_size or (512 if device.type == "cpu" else 4096)
        self._tasks: dict[str, Task] = {}
        self._owned: dict[str, Task] = {}
        self._remembered: OrderedDict[tuple[str, str, int, int], Tensor] = OrderedDict()

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

    def owned(self, name: str) -> Task:
        """A task as the owner of its expert has it, with its tensors on the device."""
        if name not in self._owned:
            own = self.testbed.owned(name)
            self._owned[name] = self.task(name) if own is None else own.to(self.device)
        return self._owned[name]

    @torch.inference_mode()
    def correct(
        self, state: State, task: str, split: str, rows: range, model: str = ""
    ) -> np.ndarray:
        """Which examples are answered correctly: (len(rows),) bool.

        ``model``: the identity of what ``state`` is, all that determines its logits.

        Raises:
            MethodError: a logit is NaN or infinite (a broken model is an error, not a low score).
        """
        what, right, finite = self.task(task), [], []
        for part in self._batches(task, split, rows):
            logits = self._logits(state, what, part, model)
            right.append(what.answered(logits, part.rows, self._asked(state, what)))
            finite.append(logits.isfinite().all())
        _check_finite(finite, task)
        return torch.cat(right).cpu().numpy()

    @torch.inference_mode()
    def gap(
        self,
        state: State,
        reference: State,
        task: str,
        split: str,
        rows: range,
        models: tuple[str, str] = ("", ""),
    ) -> tuple[float, np.ndarray]:
        """max |Δlogit| / max |logit of the reference|, and what :meth:`correct` says of ``state``.

        Logits are compared batch by batch: over a vocabulary they take gigabytes. ``models``: the
        identities of both.
        """
        what, right, finite = self.task(task), [], []
        change, size = torch.zeros(2, len(self._batches(task, split, rows)), device=self.device)
        pairs = tuple(zip((state, reference), models, strict=True))
        for i, part in enumerate(self._batches(task, split, rows)):
            logits, expected = (self._logits(of, what, part, model) for of, model in pairs)
            right.append(what.answered(logits, part.rows, self._asked(state, what)))
            finite += [logits.isfinite().all(), expected.isfinite().all()]
            change[i], size[i] = (logits - expected).abs().max(), expected.abs().max()
        _check_finite(finite, task)
        return float(change.max() / size.max()), torch.cat(right).cpu().numpy()

    def logits(self, state: State, task: str, split: str, rows: range) -> Tensor:
        """Logits (len(rows), classes) float32 on the CPU; raises as :meth:`correct` does."""
        what = self.task(task)
        with torch.inference_mode():
            parts = [self._logits(state, what, part) for part in self._batches(task, split, rows)]
        found = torch.cat(parts).cpu()
        _check_finite([found.isfinite().all()], task)
        return found

    def _batches(self, task: str, split: str, rows: range) -> list[_Part]:
        what = self.task(task)
        examples = what.split(split)
        size, end = min(self.batch_size, what.most), min(rows.stop, len(examples))
        return [
            _Part(examples[slice(start, stop)], start, stop, split)
            for start in range(rows.start, end, size)
            if (stop := min(start + size, end)) > start
        ]

    def _asked(self, state: State, task: Task) -> Ask:
        """The forward pass of ``state`` on ``task``."""
        if isinstance(state, PerTask):
            state = state.of(task.name)
        return partial(forward_of(state, self.testbed.features), state)

    def _logits(self, state: State, task: Task, part: _Part, model: str = "") -> Tensor:
        key = (model, task.name, part.start, part.stop)
        known = bool(model) and part.split == "test"
        if known and key in self._remembered:
            self._remembered.move_to_end(key)
            return self._remembered[key]
        found = task.logits(self._asked(state, task)(part.rows.given)).float()
        if known:
            self._remembered[key] = found
            while sum(value.nbytes for value in self._remembered.values()) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def _check_finite(flags: list[Tensor], task: str) -> None:
    if not torch.stack(flags).all():  # one synchronisation for all batches
        raise MethodError(f"the model gives NaN or infinite logits on {task}")


def relative_gap(logits: Tensor, reference: Tensor) -> float:
    """max |Δlogit| / max |logit|, the measure of exact equivalence (METHODS section 1)."""
    return float((logits - reference).abs().max() / reference.abs().max())
