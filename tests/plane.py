"""A linear testbed, where what training should do is plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Card, Testbed
from benchmark.api.recipe import Batch, Logits, Recipe
from benchmark.core.data import Split, Task
from benchmark.core.state import State
from benchmark.learn.training import fine_tune

WIDTH = 8
RECIPE = Recipe(steps=40, batch_size=16, learning_rate=0.05, warmup=4, frozen=("e.",))


@dataclass(frozen=True)
class Plane(Testbed):
    """features = normalised scale · weight x: a trained matrix, a frozen tensor, an integer one."""

    card: ClassVar[Card] = Card("a linear model")
    tasks: tuple[str, ...] = ("signs", "order")
    recipe: Recipe = RECIPE

    def content_hash(self) -> str:
        return "plane"

    def base(self) -> State:
        state = self.initialise(torch.Generator().manual_seed(1))
        return {**state, "e.scale": torch.ones(WIDTH), "position_ids": torch.arange(3)}

    def module(self) -> torch.nn.Module:
        return torch.nn.Module()

    def anatomy(self) -> Anatomy:
        return Anatomy("plane", (), ())

    def initialise(self, rng: torch.Generator) -> State:
        return {"weight": torch.randn(WIDTH, WIDTH, generator=rng)}

    def task(self, name: str) -> Task:
        rng = torch.Generator().manual_seed(2)
        x = torch.randn(100, WIDTH, generator=rng)
        score = x[:, 0] if name == "signs" else x[:, 1] - x[:, 2]
        split = Split({"x": x, "row": torch.arange(100)}, (score > 0).long())
        head = torch.eye(WIDTH)[[0, 1] if name == "signs" else [2, 3]]
        return Task(name, ("no", "yes"), split, split, split, head, 10.0)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.nn.functional.normalize(
            inputs["x"] @ state["weight"].T * state["e.scale"], dim=-1
        )


PLANE = Plane()
TASKS = {name: PLANE.task(name) for name in PLANE.tasks}


def tuned(*names: str, seed: int = 0, **options) -> State:
    examples = {name: TASKS[name].train for name in names or ("signs",)}
    rng = torch.Generator().manual_seed(seed)
    return fine_tune(PLANE, TASKS, PLANE.base(), examples, rng, **options)


def given(examples: Split, logits: Logits) -> Batch:
    """A batch of a testbed whose loss is the cross-entropy, by its logits."""
    return Batch(examples, logits, lambda s: Task.loss(logits(s), examples.labels), torch.Generator)


def noisy(batch: Batch, state: State, rng: torch.Generator) -> Tensor:
    """A loss that draws."""
    return (1 + 0.1 * torch.rand((), generator=rng)) * batch.loss(state)
