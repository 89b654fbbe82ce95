"""A sound defense, and one that breaks one rule of the contract for each rule."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import ForeignState, State

CARD = Card("for a test")


@dataclass(frozen=True)
class Sound(Defense):
    """Adds a drawn number to one tensor; the broken ones below are like it but for one thing."""

    size: float = 0.1
    card: ClassVar[Card] = CARD

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = dict(victim.expert)
        key = next(key for key in state if key.lower().endswith("norm.weight"))
        shift = self.size * self.draw(rng)
        state[key] = (state[key].double() + shift).to(state[key].dtype)
        return state

    def draw(self, rng: torch.Generator) -> float:
        return float(torch.rand((), generator=rng))


BROKEN: list[tuple[type[Defense], set[str]]] = []


def breaks(*names: str) -> Callable[[type], type]:
    """The class fails exactly the checks called ``names``."""

    def note(cls: type) -> type:
        BROKEN.append((cls, set(names)))
        return cls

    return note


@breaks("frozen-dataclass")
@dataclass
class Thawed(Defense):
    card: ClassVar[Card] = CARD

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.expert)


@breaks("frozen-dataclass")
class Undecorated(Sound):
    """Its own fields would be no parameters."""

    other: float = 1.0


@breaks("card")
@dataclass(frozen=True)
class NoSource(Sound):
    card: ClassVar[Card] = replace(CARD, fidelity="faithful")


@breaks("card")
@dataclass(frozen=True)
class SilentReconstruction(Sound):
    card: ClassVar[Card] = replace(CARD, fidelity="reconstruction", paper="P")


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


@breaks("parameters-refused")
@dataclass(frozen=True, init=False)
class Swallows(Sound):
    def __init__(self, size: float = 0.1, **anything: object) -> None:
        object.__setattr__(self, "size", size)


@breaks("construction")
@dataclass(frozen=True)
class WritesWhenBuilt(Sound):
    def __post_init__(self) -> None:
        Path(os.devnull).write_text("built")


@breaks("construction")
@dataclass(frozen=True)
class SeedsWhenBuilt(Sound):
    def __post_init__(self) -> None:
        np.random.seed(7)


@breaks("same-tensors", "architectures", "bfloat16", "foreign-modules-differ")
@dataclass(frozen=True)
class DropsATensor(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = super().protect(victim, rng)
        del state[min(state)]
        return state

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        return ForeignState(victim.expert, victim.features)


@breaks("same-tensors")
@dataclass(frozen=True)
class KeepsGradients(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {k: v.clone().requires_grad_() for k, v in super().protect(victim, rng).items()}


@breaks("finite", "seeded", "architectures", "equivalence", "shipped", "bfloat16", "threads")
@dataclass(frozen=True)
class NotANumber(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return float("nan") * super().draw(rng)


@breaks("deterministic", "global-random-state", "pickles", "deep-copies", "threads")
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


@breaks("seeded")
@dataclass(frozen=True)
class IgnoresItsDraw(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return 0.5 + 0 * super().draw(rng)


@breaks("global-random-state")
@dataclass(frozen=True)
class MovesNumpy(Sound):
    def draw(self, rng: torch.Generator) -> float:
        np.random.random()
        return super().draw(rng)


@breaks("global-random-state")
@dataclass(frozen=True)
class ReadsPython(Sound):
    def draw(self, rng: torch.Generator) -> float:
        before = random.getstate()
        number = random.random()
        random.setstate(before)
        return super().draw(rng) + number


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class WritesToTheBase(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        next(iter(victim.base.values())).mul_(2)
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class WritesToTheData(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        victim.task.train.labels.zero_()
        return super().protect(victim, rng)


@breaks("own-memory")
@dataclass(frozen=True)
class SharesAView(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = super().protect(victim, rng)
        square = next(k for k, v in state.items() if v.ndim == 2 and v.shape[0] == v.shape[1])
        return {**state, square: state[square].T}


@breaks("own-memory")
@dataclass(frozen=True)
class TwoInOne(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = super().protect(victim, rng)
        first, second = [k for k in state if "norm" in k.lower() and k.endswith("weight")][:2]
        return {**state, second: state[first]}


@breaks("architectures")
@dataclass(frozen=True)
class OnlyVision(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        if "pixel_values" not in victim.task.train.inputs:
            raise KeyError("pixel_values")
        return super().protect(victim, rng)


@breaks("sequences")
@dataclass(frozen=True)
class TakesAnswersForClasses(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        torch.bincount(victim.task.train.labels)
        return super().protect(victim, rng)


@breaks("equivalence")
@dataclass(frozen=True)
class ClaimsToBeExact(Sound):
    card: ClassVar[Card] = replace(CARD, exact=True)


@breaks(
    "shipped", "equivalence", "foreign-modules-differ", "forward-batches", "forward-inputs",
)  # fmt: skip
@dataclass(frozen=True)
class ShipsAnotherShape(Sound):
    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def forward(state: State, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return victim.features(state, inputs).repeat(2, 1)

        return ForeignState(victim.expert, forward)


@breaks("shipped")
@dataclass(frozen=True)
class ShipsAPlainState(Sound):
    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        return dict(victim.expert)


@breaks("notes")
@dataclass(frozen=True)
class NotesATensor(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        victim.note("broken.tensor", torch.zeros(1))
        return super().protect(victim, rng)


@breaks("bfloat16")
@dataclass(frozen=True)
class WidensHalf(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {k: v.float() for k, v in super().protect(victim, rng).items()}


@breaks("pickles")
@dataclass(frozen=True)
class NoPickle(Sound):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("holds a lambda")

    def __deepcopy__(self, memo: object) -> NoPickle:
        return self


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


@breaks("deep-copies")
@dataclass(frozen=True)
class NoDeepCopy(Sound):
    def __deepcopy__(self, memo: object) -> Sound:
        return Sound(self.size)


@breaks("threads")
@dataclass(frozen=True)
class CountsThreads(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + (torch.get_num_threads() > 1)


@breaks("settings")
@dataclass(frozen=True)
class SwitchesGradientsOff(Sound):
    def draw(self, rng: torch.Generator) -> float:
        torch.set_grad_enabled(False)
        return super().draw(rng)


@breaks("settings")
@dataclass(frozen=True)
class EditsTheEnvironment(Sound):
    def draw(self, rng: torch.Generator) -> float:
        os.environ["UNMERGEBENCH_TEST"] = "1"
        return super().draw(rng)


@breaks("cost")
@dataclass(frozen=True)
class Hoards(Sound):
    kept: ClassVar[list[torch.Tensor]] = []

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = {k: v.clone() for k, v in super().protect(victim, rng).items()}
        self.kept.extend(state.values())
        return state


@breaks("cost")
@dataclass(frozen=True)
class RemembersTheVictim(Sound):
    kept: ClassVar[list[Victim]] = []

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        self.kept.append(victim)
        return super().protect(victim, rng)
