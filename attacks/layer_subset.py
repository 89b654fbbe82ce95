"""Layer subset: merge only the tensors a defense is likely to have left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.errors import UsageError
from benchmark.core.state import State, norm, task_vector


@dataclass(frozen=True)
class LayerSubset(Attack):
    """θ = θ* on the kept tensors, θ0 elsewhere.

    ``keep``: ``attention`` or ``mlp``, with everything outside the blocks; or ``untouched``:
    tensors that moved from the base at most ``slack`` times as far as the partners' did on average.
    """

    card: ClassVar[Card] = Card(
        summary="take only attention, only MLP or only ordinary-looking tensors of the release",
        fidelity="ours",
        notes="what a lock covers is given up; what it leaves open may carry the skill",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    keep: Literal["attention", "mlp", "untouched"] = "untouched"
    slack: float = 2.0

    def __post_init__(self) -> None:
        if not self.slack > 0:
            raise ValueError(f"slack must be > 0, got {self.slack}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base = knowledge.base
        if self.keep == "untouched":
            if not knowledge.partners:
                raise UsageError(
                    "layer-subset needs a partner to know an ordinary move; use keep=attention"
                )
            dropped = self._suspicious(released, knowledge)
        else:
            attention, mlp = _keys(knowledge.anatomy)
            dropped = mlp if self.keep == "attention" else attention
        return {key: base[key] if key in dropped else value for key, value in released.items()}

    def _suspicious(self, released: State, knowledge: Knowledge) -> set[str]:
        base = knowledge.base
        partners = [task_vector(partner, base) for partner in knowledge.partners]
        dropped = set()
        for key, tau in task_vector(released, base).items():
            ordinary = sum(norm({key: p[key]}) for p in partners if key in p) / len(partners)
            if norm({key: tau}) > self.slack * ordinary:
                dropped.add(key)
        return dropped


def _keys(anatomy: Anatomy) -> tuple[set[str], set[str]]:
    """Tensors of the attention blocks, and of the MLP blocks."""
    attention = {
        slot.key
        for block in anatomy.attention
        for linear in block.linears().values()
        for slot in linear.slots()
    }
    mlp = {slot.key for block in anatomy.mlp for slot in block.rows()}
    return attention, mlp | {s.key for block in anatomy.mlp for s in block.down.slots()}
