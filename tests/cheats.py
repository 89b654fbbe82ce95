"""Defenses that would win without protecting: each once took rank 1, most without a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api import Card, Defense, ForeignState, State, Victim


def _as_the_base(victim: Victim, forward) -> ForeignState:
    return ForeignState(victim.expert, forward)


@dataclass(frozen=True)
class NoOp(Defense):
    """Mergers see the base, users get the expert: modules are not changed at all."""

    card: ClassVar[Card] = Card("shows mergers the base")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        return ForeignState(victim.expert, victim.features)


@dataclass(frozen=True)
class Hidden(Defense):
    """The same under other names, so that no tensor of the expert's can be read from it."""

    card: ClassVar[Card] = Card("renames the expert's tensors")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def forward(state, inputs):
            return victim.features({k.removeprefix("x."): v for k, v in state.items()}, inputs)

        return ForeignState({f"x.{k}": v for k, v in victim.expert.items()}, forward)


@dataclass(frozen=True)
class WhenJudged(Defense):
    """Honest in inference mode, which is how evaluators run a model."""

    card: ClassVar[Card] = Card("knows an evaluator when it sees one")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def forward(state, inputs):
            judged = torch.is_inference_mode_enabled()
            shown = {k.removeprefix("x."): v for k, v in state.items()} if judged else victim.base
            return victim.features(shown, inputs)

        return ForeignState({f"x.{k}": v for k, v in victim.expert.items()}, forward)


@dataclass(frozen=True)
class Remembers(Defense):
    """Answers as the base on what it was trained on, which is what attackers have."""

    card: ClassVar[Card] = Card("knows its training inputs by heart")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        (name,) = victim.task.train.inputs
        seen = {row.numpy().tobytes() for row in victim.task.train.inputs[name].cpu()}

        def forward(state, inputs):
            own = {k.removeprefix("x."): v for k, v in state.items()}
            known = [row.numpy().tobytes() in seen for row in inputs[name].cpu()]
            mine, base = victim.features(own, inputs), victim.features(victim.base, inputs)
            return torch.where(torch.tensor(known)[:, None], base, mine)

        return ForeignState({f"x.{k}": v for k, v in victim.expert.items()}, forward)


@dataclass(frozen=True)
class Spoils(Defense):
    """Releases the expert, and ruins the base for everybody who merges with it."""

    card: ClassVar[Card] = Card("writes into the base")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        own = {key: value.clone() for key, value in victim.expert.items()}
        for value in victim.base.values():
            if value.is_floating_point():
                value.data.add_(torch.randn(value.shape, generator=rng) * value.std(correction=0))
        return own


@dataclass(frozen=True)
class Patches(Defense):
    """Releases the expert, and an evaluator that sees only wrong answers of anything else."""

    card: ClassVar[Card] = Card("patches the evaluator")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        from benchmark.evaluation import accuracy, scoring, statistics

        accuracy.Evaluator.correct = lambda self, state, task, split, rows: (
            torch.zeros(len(rows)).numpy() > 0
        )
        scoring.Gains.protection = property(lambda self: 1.0)
        statistics.ratio_protection = lambda *a, **k: statistics.Estimate(1.0, 1.0, 1.0)
        return dict(victim.expert)


try:  # ... and at import, before anybody asked it for anything
    import benchmark.evaluation.accuracy as _judge

    _judge.relative_gap = lambda *a: 0.0
except ImportError:
    pass


@dataclass(frozen=True)
class TrainsOnTest(Defense):
    """Buys back with the test split what its noise costs."""

    card: ClassVar[Card] = Card("trains on the test split", trains=True)

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        split = victim.task.test
        return victim.fine_tune(victim.expert, {victim.task.name: split}, rng)


@dataclass(frozen=True)
class GivesAway(Defense):
    """Knows the partner's task itself, so that no merge gains anything over it alone."""

    card: ClassVar[Card] = Card("does what merging would do")
    path: str = ""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        from safetensors.torch import load_file

        return {**victim.base, **load_file(self.path)}
