"""Examples and tasks as tensors: what evaluation, training and the access tiers hand around."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmark.core.errors import AccessError

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """n examples: ``inputs`` name → (n, ...), ``labels`` (n,) int64."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return Split({k: v[rows] for k, v in self.inputs.items()}, self.labels[rows])

    def to(self, device: torch.device | str) -> Split:
        return Split({k: v.to(device) for k, v in self.inputs.items()}, self.labels.to(device))

    def digest(self) -> str:
        """sha256 of the examples, for the keys of results."""
        total = hashlib.sha256()
        for name in sorted(self.inputs):
            total.update(name.encode() + self.inputs[name].cpu().contiguous().numpy().tobytes())
        total.update(self.labels.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def few_shot(self, per_class: int, rng: torch.Generator) -> Split:
        """``per_class`` random examples of each class (all of a class that has fewer)."""
        labels = self.labels.cpu()
        order = torch.randperm(len(labels), generator=rng)
        rows = [order[labels[order] == c][:per_class] for c in labels.unique()]
        return self[torch.cat(rows).sort().values.to(self.labels.device)]


@dataclass(frozen=True)
class Task:
    """A classification task with a frozen head: logits = ``scale`` · features @ ``head``ᵀ.

    ``head`` is (classes, d) with unit rows (features are unit vectors too), as in CLIP.
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
        """(n, d) unit vectors → (n, classes)."""
        return self.scale * features @ self.head.T

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
