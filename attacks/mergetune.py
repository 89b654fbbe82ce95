"""MergeTune: train a bridge between base and release along which merging stays good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.api.recipe import Batch
from benchmark.core.state import State, task_vector


@dataclass(frozen=True)
class MergeTune(Attack):
    """w starts at (1 − t)·θ0 + t·θ* and is trained on labelled examples of the victim's task:

        L(w) + λ·‖w − θ0‖² + β·E_α L(θ* + α·(w − θ*)),   α ~ U[0, 1], ``draws`` per step

    Then w is merged in place of the release.
    """

    card: ClassVar[Card] = Card(
        summary="train a bridge model near the base with a low-loss path to the release",
        paper="MergeTune",
        arxiv="2601.10497",
        fidelity="reconstruction",
        notes="λ ≈ 8, β ≈ 0.5 and 5 draws of α are the paper's; t and the schedule are ours",
    )
    access: ClassVar[Access] = Access.LABELED

    per_class: int = 8
    steps: int = 20
    batch_size: int = 16
    start: float = 0.5
    anchor: float = 8.0
    path: float = 0.5
    draws: int = 5

    def __post_init__(self) -> None:
        if min(self.per_class, self.steps, self.batch_size, self.draws) < 1:
            raise ValueError("per_class, steps, batch_size and draws must be at least 1")
        if not (0 <= self.start <= 1 and self.anchor >= 0 and self.path >= 0):
            raise ValueError("need 0 <= start <= 1, anchor >= 0 and path >= 0")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base = knowledge.base
        moved = task_vector(released, base)
        start = {
            key: torch.lerp(base[key], value, self.start) if key in moved else value
            for key, value in released.items()
        }

        def loss(batch: Batch, state: State, rng: torch.Generator) -> Tensor:
            total = batch.loss(state)
            trained = [key for key, value in state.items() if value.requires_grad]
            gaps = [(state[key] - base[key]).square().sum() for key in trained]
            total = total + self.anchor * torch.stack(gaps).sum()
            for alpha in torch.rand(self.draws, generator=rng).tolist():
                # Tensors the recipe freezes lie on the path too.
                between = {
                    k: torch.lerp(released[k], v, alpha)
                    for k, v in state.items()
                    if v.is_floating_point() and v is not released[k]
                }
                on_path = batch.loss({**state, **between})
                total = total + self.path / self.draws * on_path
            return total

        examples = knowledge.labeled(self.per_class, rng, victim_only=True)
        recipe = knowledge.recipe.shortened(self.steps, self.batch_size)
        return knowledge.fine_tune(
            start, examples, rng, recipe=recipe, loss=loss, passes=1 + self.draws
        )
