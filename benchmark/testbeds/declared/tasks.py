"""A task whose answers a language model writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from benchmark.core.data import Ask, OwnersTask, Split, Task
from benchmark.testbeds.declared.vocabulary import shaped

#: Which examples are answered, (n,) bool; what it is given runs the model on any inputs.
Judge = Callable[[Ask, Split], Tensor]


@dataclass(frozen=True)
class LanguageTask(Task):
    """``cap`` and ``bias``: what comes between products with ``head`` and logits, as in a
    :class:`Vocabulary`. ``judge`` decides what is answered where the logits of the labels do not:
    answers are generated."""

    cap: float = 0.0
    bias: Tensor | None = None
    judge: Judge | None = None

    def logits(self, features: Tensor) -> Tensor:
        return shaped(super().logits(features), self.cap, self.bias)

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
