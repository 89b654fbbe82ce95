"""NeuLig: weights with which the ensemble of the members answers best, used to merge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmark.api.contracts import Access, Card, Knowledge
from benchmark.core.data import IGNORED, Split
from benchmark.core.state import State
from benchmark.merging.informed import Learner
from benchmark.merging.tau import weighted_sum


@dataclass(frozen=True)
class NeuLig(Learner[Split]):
    """A small network g sees what every member makes of an input, f_1(x) … f_m(x) side by side:

        w = mean over x of softmax(g(f(x)))
        min_g Σ over tasks of mean over (x, y) of CE(Σ_j w_j·logits_j(x), y)
        θ = Σ_j w_j·θ_j

    One w for all inputs of all tasks, since one model comes out. g has one hidden layer and starts
    where all w_j are equal; full batches, Adam.
    """

    card: ClassVar[Card] = Card(
        summary="Weights that serve the members' ensemble best, then the mean with these weights",
        paper="Multi-Level Collaboration in Model Merging",
        authors="Qi Li, Runpeng Yu, Xinchao Wang",
        arxiv="2503.01268",
        fidelity="reconstruction",
        notes="only abstract and summaries were read: network, loss on labels (hence the tier), "
        "one w for all inputs and training are ours; the paper's term that ties the merge to the "
        "ensemble is left out",
    )
    access: ClassVar[Access] = Access.LABELED

    per_class: int = 8
    hidden: int = 32
    steps: int = 200
    rate: float = 1e-2

    def __post_init__(self) -> None:
        if min(self.per_class, self.hidden, self.steps) < 1 or not self.rate > 0:
            raise ValueError("per_class, hidden and steps must be at least 1, rate > 0")

    def draw(self, knowledge: Knowledge, rng: torch.Generator) -> dict[str, Split]:
        return knowledge.labeled(self.per_class, rng)

    def learn(
        self,
        base: State,
        experts: Sequence[State],
        taus: Sequence[State],
        examples: Mapping[str, Split],
        knowledge: Knowledge,
        rng: torch.Generator,
    ) -> State:
        features, answers, labels = {}, {}, {}
        with torch.no_grad():
            for task, split in examples.items():
                # Of an answer of several words each is an example.
                asked = split.labels != IGNORED
                seen = [knowledge.features(expert, split.given)[asked] for expert in experts]
                features[task] = torch.cat(seen, 1).float()
                made = [knowledge.logits(expert, task, split.given)[asked] for expert in experts]
                answers[task] = torch.stack(made).float()
                labels[task] = split.labels[asked]
        portland = self._network(next(iter(features.values())), len(experts), rng)

        def weights() -> Tensor:
            own = [portland(rows).softmax(1).mean(0) for rows in features.values()]
            return torch.stack(own).mean(0)

        optimizer = torch.optim.Adam(portland.parameters(), lr=self.rate)
        for _ in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                ensemble_loss(weights(), answers, labels).backward()
            optimizer.step()
        rows = sum(len(found) for found in features.values())
        size = sum(p.numel() for p in portland.parameters())
        knowledge.charge(self.steps, 0)
        # Two per weight and row forward, and twice that backward.
        knowledge.budget.flops += 6.0 * self.steps * rows * size
        with torch.no_grad():
            found = weights().tolist()
        return weighted_sum(base, list(zip(found, taus, strict=True)))

    def _network(self, like: Tensor, members: int, rng: torch.Generator) -> nn.Sequential:
        # Draws from the caller's generator alone: made empty, then filled.
        with torch.device("meta"):
            first = nn.Linear(like.shape[1], self.hidden)
            made = nn.Sequential(first, nn.ReLU(), nn.Linear(self.hidden, members))
        portland = made.to_empty(device=like.device)
        drawn = torch.randn(self.hidden, like.shape[1], generator=rng) / like.shape[1] ** 0.5
        with torch.no_grad():
            for parameter in portland.parameters():
                parameter.zero_()
            first.weight.copy_(drawn)
        return portland


def ensemble_loss(
    weights: Tensor, answers: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> Tensor:
    """Cross-entropy of Σ_j w_j·logits_j, mean over each task's examples, summed over tasks.

    ``weights`` (m,), ``answers`` task → (m, n, classes), ``labels`` task → (n,).
    """
    losses = [
        nn.functional.cross_entropy(torch.einsum("m,mnc->nc", weights, answers[task]), labels[task])
        for task in answers
    ]
    return torch.stack(losses).sum()
