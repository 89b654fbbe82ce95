"""A task whose answers a language model writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmark.core.data import Ask, OwnersTask, Split, Task

#: Which examples are answered, (n,) bool; what it is given runs the model on any inputs.
Judge = Callable[[Ask, Split], Tensor]


@dataclass(frozen=True)
class LanguageTask(Task):
    """``cap``: logits become cap · tanh(logits / cap), as in Gemma 2; 0: they stay. ``judge``
    decides what is answered where the logits of the labels do not: answers are generated."""

    cap: float = 0.0
    judge: Judge | None = None

    def logits(self, features: Tensor) -> Tensor:
        found = super().logits(features)
        return self.cap * torch.tanh(found / self.cap) if self.cap else found

    def answered(self, logits: Tensor, batch: Split, ask: Ask) -> Tensor:
        if self.judge is None:
            return super().answered(logits, batch, ask)
        return self.judge(ask, batch)

    def without_test(self) -> Task:
        given = {f.name: getattr(self, f.name) for f in fields(OwnersLanguageTask) if f.init}
        return OwnersLanguageTask(**given)


@dataclass(frozen=True)
class OwnersLanguageTask(OwnersTask, LanguageTask):
    """The same without its test split."""
