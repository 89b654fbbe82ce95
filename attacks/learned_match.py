"""Learned matching: the gauge in which the release merges best, by gradient, on data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import gauges
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State, norm, task_vector
from benchmark.learn.lessons import Lessons
from benchmark.merging.informed import mixture
from benchmark.merging.streaming import wide


@dataclass(frozen=True)
class LearnedMatch(Attack):
    """Among all g of the gauges of ``kinds``, with τ(g) = g·θ* − θ0 and a mixture

        m(s) = θ0 + s_0·τ(g) + Σ s_i·τ_i,   each s ~ U[low, high], drawn again in every step,

    τ_i the partners' task vectors, θ_i the model that task i belongs to (of the victim's, θ*),
    x_i its unlabelled inputs:

        min_g E_s Σ_i KL(softmax(f(θ_i, x_i)) ‖ softmax(f(m(s), x_i))) + weight·‖τ(g)‖²/‖τ‖²

    (‖τ‖ the longest of all members) by Adam on the coordinates of g, zero at the start: matrices
    are exponentials, so every g has an inverse and f(g·θ*) = f(θ*) all the way. θ* is aligned with
    the base in closed form first (``align``), which finds permutations and what lies far.

    Unlike an alignment it does not ask which point of the orbit is nearest to the base, and so has
    an answer where nothing was hidden: all of them agree at s = 1, and nowhere else. ``weight`` 0
    lowers a barrier most and makes τ(g) many times as long, which only linear mergers put up with.
    """

    card: ClassVar[Card] = Card(
        summary="learn the gauge of the release in which its merges answer as their members do",
        paper="Generalized Linear Mode Connectivity for Transformers",
        arxiv="2506.22712",
        fidelity="ours",
        exact=True,
        notes="the paper's idea, learned symmetries; one side moves, continuous gauges only, and a "
        "box of mixtures in place of the path between two models",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 256
    steps: int = 150
    batch_size: int = 32
    rate: float = 0.05
    weight: float = 0.1
    low: float = 0.2
    high: float = 1.2
    align: bool = True
    #: Those of norms and biases won nothing in our runs.
    kinds: tuple[str, ...] = ("query-key", "value-output", "unit-scale")

    def __post_init__(self) -> None:
        if min(self.per_task, self.steps, self.batch_size) < 1 or not self.rate > 0:
            raise ValueError("per_task, steps and batch_size must be at least 1, rate > 0")
        if not self.weight >= 0:
            raise ValueError("weight must be at least 0")
        if not 0 <= self.low <= self.high:
            raise ValueError("need 0 <= low <= high")
        if unknown := set(self.kinds) - {kind.kind for kind in gauges.KINDS}:
            raise ValueError(f"kinds: no gauge is called {', '.join(sorted(unknown))}")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base = knowledge.base
        lessons = Lessons(released, knowledge, self.per_task, self.batch_size, rng)
        group = gauges.of(knowledge.anatomy, base).exact
        start = group.align(released, base) if self.align else dict(released)
        group = group.subset(self.kinds).smooth
        device = next(iter(base.values())).device
        coordinates = [
            tuple(torch.zeros_like(part, device=device).requires_grad_() for part in element)
            for element in group.draw(rng)
        ]
        if not coordinates:
            return start
        fixed, *others = (task_vector(s, base) for s in (start, *knowledge.partners))
        size = max(norm(tau) for tau in (fixed, *others)) ** 2 or 1.0
        still = {k: wide(v) for k, v in start.items() if v.is_floating_point()}

        def elements() -> list[gauges.Element]:
            return [g.at(x) for g, x in zip(group.gauges, coordinates, strict=True)]

        def own() -> State:
            here = dict(still)
            for gauge, element in zip(group.gauges, elements(), strict=True):
                gauge.move(here, element)
            changed = {k: v - wide(base[k]) for k, v in here.items() if v is not still[k]}
            return {**fixed, **changed}

        optimizer = torch.optim.Adam([x for parts in coordinates for x in parts], lr=self.rate)
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.rate * (1 - step / self.steps)
            shares = torch.rand(1 + len(others), generator=rng)
            shares = self.low + (self.high - self.low) * shares
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                tau = own()
                loss = lessons.loss(mixture(base, (tau, *others), shares))
                length = torch.stack([value.square().sum() for value in tau.values()]).sum()
                (loss + self.weight / size * length).backward()
            optimizer.step()
        with torch.no_grad():
            return group.apply(start, elements())
