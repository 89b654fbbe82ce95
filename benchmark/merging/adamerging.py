"""AdaMerging: coefficients that make the merged model sure of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Access, Card, Knowledge
from benchmark.core.state import State
from benchmark.merging.informed import Inputs, Learner, combined
from benchmark.merging.streaming import moved


@dataclass(frozen=True)
class AdaMerging(Learner[Inputs]):
    """θ(λ) = θ0 + Σ λ_i·τ_i with λ within [0, 1], one λ per expert and tensor (``layerwise``) or
    per expert, started at ``start`` and trained by Adam on unlabelled inputs of all tasks:

        min_λ Σ over tasks of mean over x of H(softmax(logits of θ(λ))),   H(p) = −Σ p·log p

    Attributes:
        batch_size: inputs per task and step, drawn from ``per_task`` that are held.
        steps, rate: their product bounds how far a λ can travel. The default's, 0.5, is that of the
            official code (500 steps at 1e-3), in a fifth of its steps;
            ``adamerging(steps=500, rate=0.001, batch_size=32)`` is as published.
    """

    card: ClassVar[Card] = Card(
        summary="Learns the coefficients by minimising the entropy of predictions",
        paper="AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        authors="Enneng Yang et al.",
        arxiv="2310.02575",
        fidelity="faithful",
        notes="λ from 0.3, clamped to [0, 1], Adam, inputs in sixteens as in official code; 100 "
        "steps at 5e-3 instead of 500 at 1e-3, one batch per task and step instead of two; the "
        "free-rider's own unlabelled inputs where the official code adapts on test inputs",
    )
    access: ClassVar[Access] = Access.UNLABELED

    layerwise: bool = True
    per_task: int = 256
    batch_size: int = 16
    steps: int = 100
    rate: float = 5e-3
    start: float = 0.3

    def __post_init__(self) -> None:
        if min(self.per_task, self.batch_size, self.steps) < 1 or not self.rate > 0:
            raise ValueError("per_task, batch_size and steps must be at least 1, rate > 0")
        if not 0 <= self.start <= 1:
            raise ValueError("start must be within 0 and 1")

    def draw(self, knowledge: Knowledge, rng: torch.Generator) -> dict[str, Inputs]:
        return dict(knowledge.unlabeled(self.per_task, rng))

    def learn(
        self,
        base: State,
        experts: Sequence[State],
        taus: Sequence[State],
        examples: Mapping[str, Inputs],
        knowledge: Knowledge,
        rng: torch.Generator,
    ) -> State:
        keys = moved(taus)
        shape = (len(taus), len(keys) if self.layerwise else 1)
        raw = torch.full(shape, self.start, device=base[keys[0]].device, requires_grad=True)

        def state() -> State:
            columns = raw.clamp(0, 1).expand(-1, len(keys)).unbind(1)
            return {
                **base,
                **{
                    key: combined(
                        base[key],
                        [(column[i], tau[key]) for i, tau in enumerate(taus) if key in tau],
                    )
                    for key, column in zip(keys, columns, strict=True)
                },
            }

        optimizer = torch.optim.Adam([raw], lr=self.rate)
        for _ in range(self.steps):
            batches = {
                task: _batch(inputs, self.batch_size, rng) for task, inputs in examples.items()
            }
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                total = torch.stack(
                    [entropy(knowledge, state(), task, batch) for task, batch in batches.items()]
                ).sum()
                total.backward()
            optimizer.step()
            knowledge.charge(1, sum(len(next(iter(b.values()))) for b in batches.values()))
        with torch.no_grad():
            return state()


def entropy(knowledge: Knowledge, state: State, task: str, inputs: Inputs) -> Tensor:
    """The mean entropy, in nats, of the predictions of ``state``; differentiable."""
    log_p = knowledge.logits(state, task, inputs).float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _batch(inputs: Inputs, size: int, rng: torch.Generator) -> dict[str, Tensor]:
    first = next(iter(inputs.values()))
    rows = torch.randperm(len(first), generator=rng)[:size].to(first.device)
    return {name: value[rows] for name, value in inputs.items()}
