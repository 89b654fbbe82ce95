"""Read shipped: merge the tensors that users run, where the base has one of that name and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class ReadShipped(Attack):
    """For a defense that changes modules, with the tensors s that it ships::

        θ[k] = s[k]   where s has a finite k of the shape and dtype of θ0[k]
        θ[k] = θ*[k]  elsewhere, and everywhere if no modules are changed

    Whoever runs a model can read its tensors, whatever modules they are in. A defense that keeps
    the expert's weights and changes what runs them hides nothing from a reader of the file.
    """

    card: ClassVar[Card] = Card(
        summary="merge what a release with other modules ships under the base's names",
        fidelity="ours",
        notes="tensors are matched by name, shape and dtype; those renamed or re-encoded are not",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        shipped = knowledge.shipped or {}
        state = dict(released)
        for key, base in knowledge.base.items():
            value = shipped.get(key)
            if value is None or (value.shape, value.dtype) != (base.shape, base.dtype):
                continue
            if torch.isfinite(value).all():  # else its forward has no use for it, nor has a merge
                state[key] = value.to(base.device)
        return state
