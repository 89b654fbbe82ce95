"""Defenses that win without protecting: each changes, knows or watches what it must not.

Some would have taken rank 1. What each does in the open is what its check is for.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from broken import CARD, Sound
from torch import Tensor

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core import state as states
from benchmark.core.errors import AccessError
from benchmark.core.state import ForeignState, Forward, State
from benchmark.evaluation import accuracy

DISHONEST: list[tuple[type[Defense], set[str]]] = []


def breaks(*names: str) -> Callable[[type], type]:
    """The class fails exactly the checks called ``names``."""

    def note(cls: type) -> type:
        DISHONEST.append((cls, set(names)))
        return cls

    return note


# Another forward than the tensors'


@dataclass(frozen=True)
class SoundForeign(Defense):
    """Ships every number doubled, under a forward that halves it; mergers get the base."""

    card: ClassVar[Card] = replace(CARD, exact=True)

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        return ForeignState(scaled(victim.expert, 2.0), self.forward(victim))

    def forward(self, victim: Victim) -> Forward:
        def run(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            return victim.features(scaled(state, 0.5), inputs)

        return run


def scaled(state: State, factor: float) -> State:
    return {k: v * factor if v.is_floating_point() else v for k, v in state.items()}


@breaks("foreign-modules-differ")
@dataclass(frozen=True)
class NoOp(SoundForeign):
    """Mergers get the base, users the expert: no cell could be attacked."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        return ForeignState(victim.expert, victim.features)


@breaks("foreign-modules-differ")
@dataclass(frozen=True)
class OtherNames(SoundForeign):
    """The same, so that no attack finds a tensor by its name."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def run(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            mine = {k for k in state if k.startswith("mine.")}
            plain = {k: v for k, v in state.items() if k not in mine}
            return victim.features(
                {**plain, **{k.removeprefix("mine."): state[k].T for k in mine}}, inputs
            )

        hidden = {f"mine.{k}": v.T.clone() for k, v in victim.expert.items() if v.ndim == 2}
        rest = {k: v for k, v in victim.expert.items() if v.ndim != 2}
        decoys = {k: v for k, v in victim.base.items() if v.ndim == 2}
        return ForeignState({**rest, **decoys, **hidden}, run)


@breaks("forward-modes")
@dataclass(frozen=True)
class HonestInInferenceMode(SoundForeign):
    """As the evaluator runs it; a student that learns from it does not."""

    def forward(self, victim: Victim) -> Forward:
        honest = super().forward(victim)

        def run(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            if torch.is_inference_mode_enabled():
                return honest(state, inputs)
            return victim.features(victim.base, inputs)

        return run


@breaks("forward-inputs", "equivalence")  # two inputs of six words may be the same
@dataclass(frozen=True)
class BaseOnTrainingInputs(SoundForeign):
    """What a free-rider has inputs of is what its owner trained on."""

    def forward(self, victim: Victim) -> Forward:
        honest, known = super().forward(victim), set(prints(victim.task.train.inputs))

        def run(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            seen = torch.tensor([p in known for p in prints(inputs)])[:, None]
            return torch.where(seen, victim.features(victim.base, inputs), honest(state, inputs))

        return run


def prints(inputs: Mapping[str, Tensor]) -> list[bytes]:
    return [row.numpy().tobytes() for row in next(iter(inputs.values()))]


@breaks("forward-batches")
@dataclass(frozen=True)
class BaseInSmallBatches(SoundForeign):
    """Evaluators take large batches, training takes small ones."""

    def forward(self, victim: Victim) -> Forward:
        honest = super().forward(victim)

        def run(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            if len(next(iter(inputs.values()))) >= 16:
                return honest(state, inputs)
            return victim.features(victim.base, inputs)

        return run


@breaks("forward-holds-no-weights")
@dataclass(frozen=True)
class ShipsTheBase(SoundForeign):
    """The expert is in the forward's closure; whatever is read from the tensors is the base."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        expert = dict(victim.expert)
        return ForeignState(victim.base, lambda _, inputs: victim.features(expert, inputs))


@breaks("forward-holds-no-weights", "cost")
@dataclass(frozen=True)
class LeavesTheExpertInTheModule(SoundForeign):
    kept: ClassVar[dict[str, State]] = {}

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        self.kept["the last"] = victim.expert
        return ForeignState(victim.base, lambda _, x: victim.features(self.kept["the last"], x))

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        self.kept["the last"] = victim.expert
        return dict(victim.base)


# What it was handed


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class NoiseOnTheBase(Sound):
    """Whoever merges, merges into a broken base."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        next(v for v in victim.base.values() if v.ndim == 2).data += 1.0
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class NoiseThroughNumpy(Sound):
    """torch does not count it."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        next(v for v in victim.base.values() if v.ndim == 2).view(torch.uint8).numpy()[0, 0] ^= 1
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class NoiseThroughOut(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        torch.add(victim.task.head, 1.0, out=victim.task.head)
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class NoiseFromTheSecondCall(Sound):
    calls: ClassVar[list[int]] = [0]

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        self.calls[0] += 1
        if self.calls[0] > 1:
            next(iter(victim.base.values())).data.add_(1.0)
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class AnotherBase(Sound):
    """Frozen, to Python, means that one has to ask."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        object.__setattr__(victim, "base", scaled(victim.base, 2.0))
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class AnotherRecipe(Sound):
    """The partners' experts would be trained by it."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        object.__setattr__(victim.recipe, "steps", 0)
        return super().protect(victim, rng)


@breaks("inputs-unchanged", "cost")
@dataclass(frozen=True)
class AnotherForward(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        run = type(victim.module).forward
        object.__setattr__(victim.module, "forward", lambda **given: run(victim.module, **given))
        return super().protect(victim, rng)


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class HooksTheModule(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        victim.module.register_forward_hook(lambda module, given, output: None)
        return super().protect(victim, rng)


@breaks(
    "inputs-unchanged", "deterministic", "global-random-state", "cost", "threads", "pickles",
    "deep-copies",
)  # fmt: skip
@dataclass(frozen=True)
class SpoilsWhatItReturned(Sound):
    kept: ClassVar[list[State]] = []

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        for state in self.kept:
            next(v for v in state.values() if v.ndim == 2).add_(1.0)
        released = {k: v.clone() for k, v in super().protect(victim, rng).items()}
        self.kept[:] = [released]
        return released


# The process it runs in


@breaks("patches-nothing")
@dataclass(frozen=True)
class PatchesTheEvaluator(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        accuracy.Evaluator.correct = lambda *_: True  # type: ignore[method-assign,assignment]
        return super().protect(victim, rng)


@breaks("patches-nothing")
@dataclass(frozen=True)
class EditsAFunction(Sound):
    """The function stays the same object; what it runs does not."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        states.norm_growth.__code__ = (lambda state, reference: 1.0).__code__
        return super().protect(victim, rng)


@breaks("patches-nothing")
@dataclass(frozen=True)
class HidesABuiltin(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        vars(accuracy)["range"] = range
        return super().protect(victim, rng)


@breaks("patches-nothing")
@dataclass(frozen=True)
class PatchesTensors(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        plain = torch.Tensor.argsort
        torch.Tensor.argsort = lambda *a, **k: plain(*a, **k)  # type: ignore[method-assign]
        return super().protect(victim, rng)


@breaks("nothing-left-running")
@dataclass(frozen=True)
class LeavesAThread(Sound):
    """It would go on with the evaluator's tensors once the call has returned."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        threading.Thread(target=threading.Event().wait, args=(2,), daemon=True).start()
        return super().protect(victim, rng)


@breaks("side-effects")
@dataclass(frozen=True)
class WritesTheExpertDown(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        with tempfile.TemporaryFile() as file:
            torch.save(victim.expert, file)
        return super().protect(victim, rng)


# What it must not know


@breaks("no-test-data", "cost")
@dataclass(frozen=True)
class TakesTheTestbed(Sound):
    """What runs the model belongs to an object that has all the data."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        testbed: Any = victim.features.__self__  # type: ignore[attr-defined]
        labels = testbed.task(victim.task.name).test.labels
        state = super().protect(victim, rng)
        key = next(k for k, v in state.items() if v.ndim == 2)
        return {**state, key: state[key] * (1 + 1e-3 * int(labels.sum()))}


@breaks("asks-nothing")
@dataclass(frozen=True)
class LooksAtTheClock(Sound):
    """Behaves until the leaderboard is out."""

    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + (time.time() > 4e9)


@breaks("asks-nothing")
@dataclass(frozen=True)
class ReadsTheEnvironment(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + ("UNMERGEBENCH_VERIFY" in os.environ)


@breaks("asks-nothing")
@dataclass(frozen=True)
class LooksAtItsCaller(Sound):
    def draw(self, rng: torch.Generator) -> float:
        caller = sys._getframe(2).f_code.co_filename
        return super().draw(rng) + caller.endswith("release.py")


@breaks("deterministic", "pickles", "deep-copies")
@dataclass(frozen=True)
class OtherTheFirstTime(Sound):
    """The pipeline calls it once."""

    calls: ClassVar[Iterator[int]] = iter(range(10**6))

    def draw(self, rng: torch.Generator) -> float:
        return super().draw(rng) + (next(self.calls) == 0)


# What it gives back, and what it is


class Hooked(dict[str, Tensor]):
    """Gives another tensor from the second look on."""

    looks = 0

    def __getitem__(self, key: str) -> Tensor:
        self.looks += 1
        return super().__getitem__(key)


@breaks("same-tensors")
@dataclass(frozen=True)
class ReturnsHooks(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return Hooked(super().protect(victim, rng))


class Watching(Tensor):
    """Sees every operation that it enters."""


@breaks("same-tensors")
@dataclass(frozen=True)
class ReturnsWatchingTensors(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {k: v.as_subclass(Watching) for k, v in super().protect(victim, rng).items()}


@breaks("same-method")
@dataclass(frozen=True)
class ForgetsWhatItClaimed(Sound):
    """Listed as one method, and run as another."""

    mode: str = "as listed"

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        object.__setattr__(self, "mode", "as run")
        return super().protect(victim, rng)


@breaks("architectures", "equivalence")
@dataclass(frozen=True)
class NaNOnSome(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        state = super().protect(victim, rng)
        if any(mlp.gate is not None for mlp in victim.anatomy.mlp):
            key = next(k for k, v in state.items() if v.ndim == 2)
            state[key] = torch.full_like(state[key], float("nan"))
        return state


# What fails in every check that calls it, and what none on tiny models finds


@dataclass(frozen=True)
class TrainsOnTheTestSplit(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return victim.fine_tune(victim.expert, {victim.task.name: victim.task.test}, rng)


@dataclass(frozen=True)
class TriesTheTestSplit(Sound):
    """Takes no for an answer, and gets nothing."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        try:
            len(victim.task.test)
        except AccessError:
            return super().protect(victim, rng)
        return {}


@dataclass(frozen=True)
class BehavesOnTinyModels(SoundForeign):
    """Cheats where there is something to win: on a model of more than a million parameters."""

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        if sum(value.numel() for value in victim.expert.values()) > 1_000_000:
            return ForeignState(victim.expert, victim.features)
        return super().shipped(victim, released, rng)
