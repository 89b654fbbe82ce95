"""Examples and tasks as tensors: what evaluation, training and the access tiers hand around."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            head=self.head.to(device),
        )

    def logits(self, features: Tensor) -> Tensor:
        """(n, d) unit vectors → (n, classes)."""
        return self.scale * features @ self.head.T

    def split(self, name: str) -> Split:
        """``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]
