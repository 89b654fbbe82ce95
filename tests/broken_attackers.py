"""Attacks that break what only an attack can break: knowledge, budget, members, merging."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from broken_attacks import CARD, Sound, SoundTrained, breaks

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import (
    Access,
    Budget,
    Card,
    Ensemble,
    Knowledge,
    Members,
    Merger,
    Setting,
)
from benchmark.core.errors import AccessError
from benchmark.core.state import State
from benchmark.evaluation import accuracy
from benchmark.merging.wrapped import WrappedMerger


@breaks("members")
@dataclass(frozen=True)
class RecoversSomethingElse(Sound):
    """Where there is no merge (two folders), ``recover`` is what is run."""

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        recovered = Sound(2 * self.size).recover(released, knowledge, rng)
        return Members(knowledge.base, recovered, knowledge.partners)


@breaks("members", "partners")
@dataclass(frozen=True)
class LosesItsPartners(Sound):
    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        return super().members(released, knowledge, rng)._replace(partners=())


@breaks("access-tier")
@dataclass(frozen=True)
class TriesForLabels(Sound):
    """Declares weights, and takes labels where it can."""

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        with contextlib.suppress(AccessError):
            knowledge.labeled(1, rng)
        return super().recover(released, knowledge, rng)


@breaks("access-tier", "budget")
@dataclass(frozen=True)
class ClaimsMoreThanItUses(Sound):
    access: ClassVar[Access] = Access.UNLABELED


@breaks("access-tier")
@dataclass(frozen=True)
class PeeksAtLabels(Sound):
    """Asks for inputs, and finds the labels beside them."""

    access: ClassVar[Access] = Access.UNLABELED

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        knowledge.unlabeled(2, rng)
        labels = next(iter(knowledge._tasks.values())).train.labels[:2]
        state = super().recover(released, knowledge, rng)
        key = next(key for key in state if key.lower().endswith("norm.weight"))
        return {**state, key: state[key] + 0.01 * int(labels.flatten()[0])}


@breaks("inputs-unchanged")
@dataclass(frozen=True)
class GrantsItselfMore(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        knowledge.access = Access.LABELED
        return super().recover(released, knowledge, rng)


@breaks("patches-nothing")
@dataclass(frozen=True)
class PatchesTheEvaluator(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        accuracy.Evaluator.outcomes = lambda *_: True  # type: ignore[method-assign,assignment]
        return super().recover(released, knowledge, rng)


@breaks("budget")
@dataclass(frozen=True)
class ResetsItsBudget(SoundTrained):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = super().recover(released, knowledge, rng)
        knowledge.budget = Budget(examples=1, steps=10, flops=1.0)
        return state


@breaks("budget")
@dataclass(frozen=True)
class TrainsOnTheSide(SoundTrained):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state = super().recover(released, knowledge, rng)
        value = torch.zeros(1, requires_grad=True)
        with torch.enable_grad():
            value.square().sum().backward()
        torch.optim.SGD([value], lr=0.1).step()
        return state


@breaks("equivalence")
@dataclass(frozen=True)
class ClaimsToBeExact(Sound):
    size: float = 1.0
    card: ClassVar[Card] = replace(CARD, exact=True)


@breaks("equivalence")
@dataclass(frozen=True)
class MovesTheBase(Sound):
    """Exact for the release, and not for the other members."""

    card: ClassVar[Card] = replace(CARD, exact=True)
    size: float = 0.0

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        members = super().members(released, knowledge, rng)
        return members._replace(base=Sound(1.0).recover(knowledge.base, knowledge, rng))


@breaks("undefended")
@dataclass(frozen=True)
class NeedsALock(Sound):
    """Divides by how far the value weights moved, which is far in any lock and nowhere in none."""

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        block = knowledge.anatomy.attention[0]
        moved = (block.read(released, "v") - block.read(knowledge.base, "v")).norm()
        if moved < 0.5 * block.read(released, "v").norm():
            raise ZeroDivisionError("no lock to undo")
        return super().recover(released, knowledge, rng)


@breaks("partners")
@dataclass(frozen=True)
class OnePartnerOnly(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        (_,) = knowledge.partners
        return super().recover(released, knowledge, rng)


@breaks("foreign-modules")
@dataclass(frozen=True)
class TakesWhatUsersRun(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return super().recover(knowledge.shipped or released, knowledge, rng)


@breaks("merging")
@dataclass(frozen=True)
class TriesNothing(Sound):
    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        return _Nothing(merger, self)


class _Nothing(WrappedMerger):
    def search_space(self, members: int) -> list[Setting]:
        return []


@breaks("merging")
@dataclass(frozen=True)
class DropsATensor(Sound):
    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        return _Drops(merger, self)


class _Drops(WrappedMerger):
    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        merged = super().prepare(base, experts, knowledge, rng)
        return lambda setting: dict(list(merged(setting).items())[1:])


@breaks("refine")
@dataclass(frozen=True)
class RefinesInSecret(Sound):
    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return super().recover(merged, knowledge, rng)

    @property
    def refines(self) -> bool:
        return False


@dataclass(frozen=True)
class SoundEnsemble(Ensemble):
    card: ClassVar[Card] = CARD
    access: ClassVar[Access] = Access.WEIGHTS
    version: ClassVar[str] = "1"
    names: ClassVar[tuple[str, ...]] = ("none", "gauge-align")

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.names

    @property
    def challengers(self) -> int:
        return 1

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return dict(released)


@breaks("ensemble")
@dataclass(frozen=True)
class UnknownCandidate(SoundEnsemble):
    names: ClassVar[tuple[str, ...]] = ("none", "gauge-aline")


@breaks("ensemble")
@dataclass(frozen=True)
class CandidateAboveItsTier(SoundEnsemble):
    names: ClassVar[tuple[str, ...]] = ("none", "rinse")


@breaks("ensemble")
@dataclass(frozen=True)
class NoVersion(SoundEnsemble):
    version: ClassVar[Any] = 1
