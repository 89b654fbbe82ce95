"""Trap smoothing: a trap in reverse, trained until every mixture answers as its members do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State, statistic, task_vector
from benchmark.learn.lessons import Lessons
from benchmark.merging.informed import mixture
from benchmark.merging.streaming import moved, wide


@dataclass(frozen=True)
class TrapSmooth(Attack):
    """τ starts at ``start``·τ* and is trained on unlabelled inputs of every task. With a mixture

        m(s) = θ0 + s_0·τ + Σ s_i·τ_i,   each s ~ U[low, high], drawn again in every step,

    τ_i the partners' task vectors, θ_i the model that task i belongs to (of the victim's, θ*):

        min_τ E_s Σ_i KL(softmax(f(θ_i, x_i)) ‖ softmax(f(m(s), x_i))) + anchor·‖τ − τ*‖²

    Trap² raises the loss along the line θ0 + s·τ*. Here it is lowered, without labels, over the
    whole box in which a merger looks for coefficients: the partners' directions are a part of it,
    which no owner knows. The anchor keeps what the release does alone.
    """

    card: ClassVar[Card] = Card(
        summary="train the release until all mixtures with the partners answer as their members",
        fidelity="ours",
        notes="answers trap2, trained however long; judged against the same inputs and steps "
        "spent on the base",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 256
    steps: int = 80
    batch_size: int = 32
    #: In units of the recipe's learning rate for all tensors.
    rate: float = 3.0
    start: float = 1.0
    anchor: float = 0.02
    low: float = 0.2
    high: float = 1.2

    def __post_init__(self) -> None:
        if min(self.per_task, self.steps, self.batch_size) < 1 or not self.rate > 0:
            raise ValueError("per_task, steps and batch_size must be at least 1, rate > 0")
        if not (self.start >= 0 and self.anchor >= 0):
            raise ValueError("start and anchor must be at least 0")
        if not 0 <= self.low <= self.high:
            raise ValueError("need 0 <= low <= high")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, recipe = knowledge.base, knowledge.recipe.adapted(None)
        recipe = recipe.shortened(self.steps, self.batch_size)
        lessons = Lessons(released, knowledge, self.per_task, self.batch_size, rng)
        own, *others = (task_vector(s, base) for s in (released, *knowledge.partners))
        # Also what only partners moved: the control starts at the base, which moved nothing.
        first = {k: wide(own.get(k, torch.zeros_like(base[k]))) for k in moved([own, *others])}
        tau = {key: self.start * value for key, value in first.items()}
        trained = {k: v.requires_grad_() for k, v in tau.items() if not statistic(k)}
        if not trained:
            return dict(released)
        optimizer = torch.optim.Adam(trained.values(), lr=self.rate * recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
        for _ in range(self.steps):
            shares = torch.rand(1 + len(others), generator=rng)
            shares = self.low + (self.high - self.low) * shares
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = lessons.loss(mixture(base, (tau, *others), shares))
                gaps = [(v - first[k]).square().sum() for k, v in trained.items()]
                (loss + self.anchor * torch.stack(gaps).sum()).backward()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            smoothed = mixture(base, (tau,), torch.ones(1))
        return {**released, **{key: smoothed[key] for key in tau}}
