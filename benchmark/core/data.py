"""Examples and tasks as tensors: what evaluation, training and the access tiers hand around."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmark.core.errors import AccessError

_SPLITS = ("train", "validation", "test")
#: A label of no class: padding behind an answer.
IGNORED = -100
#: Logits that are computed at once, at most: 256 MiB of float32.
_LOGITS = 2**26


@dataclass(frozen=True)
class Split:
    """n examples: ``inputs`` name → (n, ...), ``labels`` int64.

    Labels are (n,), or (n, T) for answers of up to T tokens, with ``IGNORED`` behind an answer, or
    (n, k, T) where an example may be asked for in k ways and one answer is enough.
    ``answers``: what takes the place of inputs where an answer is read along with the question, as
    a language model is taught. Whoever gets no labels gets none of it.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Tensor]:
        """What a forward pass reads of whoever has the labels."""
        return {**self.inputs, **self.answers}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return self._with(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Split:
        return self._with(lambda value: value.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Split:
        inputs, answers = (
            {key: change(value) for key, value in part.items()}
            for part in (self.inputs, self.answers)
        )
        return Split(inputs, change(self.labels), answers)

    def digest(self) -> str:
        """sha256 of the examples, for the keys of results."""
        total = hashlib.sha256()
        for part in (self.inputs, self.answers):
            for name in sorted(part):
                total.update(name.encode() + part[name].cpu().contiguous().numpy().tobytes())
        total.update(self.labels.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def few_shot(self, per_class: int, rng: torch.Generator) -> Split:
        """``per_class`` random examples of each class (all of a class that has fewer).

        Answers of several tokens are all of one class.
        """
        labels = self.labels.cpu()
        order = torch.randperm(len(labels), generator=rng)
        if labels.ndim > 1:
            labels = torch.zeros(len(labels))
        rows = [order[labels[order] == c][:per_class] for c in labels.unique()]
        return self[torch.cat(rows).sort().values.to(self.labels.device)]


#: Inputs by name → features, of the State that is asked.
Ask = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Task:
    """A task with a frozen head: logits = ``scale`` · features @ ``head``ᵀ.

    ``head`` is (classes, d) with unit rows (features are unit vectors too), as in CLIP. Where an
    answer has several tokens, features are (n, T, d), and the classes are a vocabulary.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    head: Tensor
    scale: float

    def to(self, device: torch.device | str) -> Task:
        moved = [*self.splits, "head"]
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def logits(self, features: Tensor) -> Tensor:
        """(..., d) features → (..., classes)."""
        return self.scale * features @ self.head.T

    def answered(self, logits: Tensor, batch: Split, ask: Ask) -> Tensor:
        """Which examples of ``batch`` are answered, (n,) bool.

        ``logits``: what the model gives for ``batch.given``; ``ask``: its forward pass, for tasks
        that look at more than these logits.
        """
        return self.right(logits, batch.labels)

    @property
    def most(self) -> int:
        """The most examples whose logits are computed at once; over a vocabulary they are many."""
        tokens = max(split.labels[:1].numel() for split in (self.train, self.validation))
        return max(1, _LOGITS // (len(self.head) * max(1, tokens)))

    @staticmethod
    def right(logits: Tensor, labels: Tensor) -> Tensor:
        """Which examples are answered, every token of them and in any way that they are asked for:
        (n,) bool; none whose logits are NaN.

        Greedy decoding gives an answer if and only if each of its tokens is the argmax where all
        before it are given.
        """
        # argmax takes NaN for the largest.
        hits = (logits.argmax(-1) == labels) & logits.isfinite().all(-1) | (labels == IGNORED)
        whole = hits if labels.ndim == 1 else hits.all(-1)
        return whole.reshape(len(labels), -1).any(1)

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the last axis; the mean, or sum, over all labels but the ignored."""
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=IGNORED
        )

    def split(self, name: str) -> Split:
        """``train``, ``validation`` or ``test``."""
        if name not in _SPLITS:
            raise KeyError(name)
        found: Split = getattr(self, name)
        return found

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that it gives."""
        return _SPLITS

    def without_test(self) -> Task:
        """The same as an owner has it: to ask for the test split is an :class:`AccessError`."""
        return OwnersTask(**{f.name: getattr(self, f.name) for f in fields(OwnersTask) if f.init})


@dataclass(frozen=True)
class OwnersTask(Task):
    """A task without its test split."""

    test: Split = field(init=False, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        # Only what is not there comes here.
        if name == "test":
            raise AccessError("the owner's defense is not given the test split")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def splits(self) -> tuple[str, ...]:
        return _SPLITS[:2]
