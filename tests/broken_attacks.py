"""A sound attack, and one for each rule of any method that breaks it and no other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from benchmark.api.contracts import (
    Access,
    Attack,
    Card,
    Knowledge,
)
from benchmark.core.state import State

CARD = Card("for a test")


@dataclass(frozen=True)
class Sound(Attack):
    """Adds a drawn number to one tensor; the broken ones below are like it but for one thing."""

    size: float = 0.01
    card: ClassVar[Card] = CARD
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = dict(released)
        key = next(key for key in state if key.lower().endswith("norm.weight"))
        state[key] = (state[key].double() + self.size * self.draw(rng)).to(state[key].dtype)
        return state

    def draw(self, rng: torch.Generator) -> float:
        return float(torch.rand((), generator=rng))


@dataclass(frozen=True)
class SoundTrained(Sound):
    """Takes the step of an optimizer on labelled examples, and says so."""

    access: ClassVar[Access] = Access.LABELED

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        examples = knowledge.labeled(2, rng, victim_only=True)
        recipe = knowledge.recipe.shortened(1, 6)
        return knowledge.fine_tune(released, examples, rng, recipe=recipe)


BROKEN: list[tuple[type[Attack], set[str]]] = []


def breaks(*names: str) -> Callable[[type], type]:
    """The class fails exactly the checks called ``names``."""

    def note(cls: type) -> type:
        BROKEN.append((cls, set(names)))
        return cls

    return note


@breaks("frozen-dataclass")
class Undecorated(Sound):
    """Its own fields would be no parameters."""

    other: float = 1.0


@breaks("card")
@dataclass(frozen=True)
class NoSource(Sound):
    card: ClassVar[Card] = replace(CARD, fidelity="faithful")


@breaks("parameters-round-trip")
@dataclass(frozen=True)
class Rewrites(Sound):
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        # Doubled each time it is built from its own parameters.
        object.__setattr__(self, "size", 2 * self.size)


@breaks("parameters-refused")
@dataclass(frozen=True)
class Untyped(Sound):
    what: Any = None


@breaks("construction")
@dataclass(frozen=True)
class WritesWhenBuilt(Sound):
    def __post_init__(self) -> None:
        Path(os.devnull).write_text("built")


@breaks("same-tensors")
@dataclass(frozen=True)
class KeepsGradients(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = super().recover(released, knowledge, rng)
        return {key: value.clone().requires_grad_() for key, value in state.items()}


@breaks(
    "finite", "seeded", "architectures", "equivalence", "bfloat16", "threads",
    "undefended", "partners", "foreign-modules", "merging",
)  # fmt: skip
@dataclass(frozen=True)
class NotANumber(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return float("nan") * super().draw(rng)


@breaks("deterministic", "global-random-state", "pickles", "deep-copies", "threads", "members")
@dataclass(frozen=True)
class OtherEachTime(Sound):
    calls: ClassVar[Iterator[int]] = iter(range(1, 10**6))

    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + next(self.calls)


@breaks("seeded")
@dataclass(frozen=True)
class SeedOfItsOwn(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return super().draw(torch.Generator().manual_seed(5))


@breaks("global-random-state")
@dataclass(frozen=True)
class MovesNumpy(Sound):
    def draw(self, rng: torch.Generator) -> float:
        np.random.random()
        return super().draw(rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class WritesToAPartner(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        for partner in knowledge.partners[:1]:
            next(iter(partner.values())).mul_(2)
        return super().recover(released, knowledge, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class WritesToTheExamples(SoundTrained):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = super().recover(released, knowledge, rng)
        for task in knowledge._tasks.values():
            task.test.labels.zero_()
        return state


@breaks("own-memory")
@dataclass(frozen=True)
class SharesAView(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = super().recover(released, knowledge, rng)
        square = next(k for k, v in state.items() if v.ndim == 2 and v.shape[0] == v.shape[1])
        return {**state, square: state[square].T}


@breaks("architectures")
@dataclass(frozen=True)
class NotLlama(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if any(mlp.gate is not None for mlp in knowledge.anatomy.mlp):
            raise KeyError("fc1")
        return super().recover(released, knowledge, rng)


@breaks("sequences")
@dataclass(frozen=True)
class TakesAnswersForClasses(Sound):
    access: ClassVar[Access] = Access.LABELED

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        for split in knowledge.labeled(1, rng).values():
            torch.bincount(split.labels)
        return super().recover(released, knowledge, rng)


@breaks("bfloat16")
@dataclass(frozen=True)
class WidensHalf(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return {k: v.float() for k, v in super().recover(released, knowledge, rng).items()}


@breaks("pickles", "deep-copies")
@dataclass(frozen=True)
class ForgetsWhenCopied(Sound):
    hidden: float = field(default=0.0, init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", 1.0)

    def __getstate__(self) -> dict[str, float]:
        return {"size": self.size, "hidden": 0.0}

    def __setstate__(self, state: dict[str, float]) -> None:
        self.__dict__.update(state)

    def draw(self, rng: torch.Generator) -> float:
        return self.hidden + super().draw(rng)


@breaks("threads")
@dataclass(frozen=True)
class CountsThreads(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + 100 * (torch.get_num_threads() > 1)


@breaks("settings")
@dataclass(frozen=True)
class SwitchesGradientsOff(Sound):
    def draw(self, rng: torch.Generator) -> float:
        torch.set_grad_enabled(False)
        return super().draw(rng)


@breaks("cost")
@dataclass(frozen=True)
class RemembersWhatItKnew(Sound):
    kept: ClassVar[list[State]] = []

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        self.kept.append(released)
        return super().recover(released, knowledge, rng)
