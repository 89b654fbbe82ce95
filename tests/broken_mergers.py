"""A sound merger, and one for each rule of mergers alone that breaks it and, but where said, no
other. The rules of any method are broken in broken_attacks.py."""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from benchmark.api.contracts import Access, Card, Knowledge, Merger, Setting
from benchmark.core.errors import AccessError
from benchmark.core.state import PerTask, State

CARD = Card("for a test")


class Call(NamedTuple):
    """The arguments of ``merge``."""

    base: State
    experts: Sequence[State]
    setting: Setting
    knowledge: Knowledge | None
    rng: torch.Generator


@dataclass(frozen=True)
class Sound(Merger):
    """θ0 + Σ c·τ; the broken ones below are like it but for one thing."""

    size: float = 1.0
    card: ClassVar[Card] = CARD

    def search_space(self, members: int) -> list[Setting]:
        return [Setting((c,) * members) for c in (0.5, 1.0)]

    def merge(
        self,
        base: State,
        experts: Sequence[State],
        setting: Setting,
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> State:
        return self.made(Call(base, experts, setting, knowledge, rng))

    def made(self, call: Call) -> State:
        base, experts, setting, _, rng = call
        out = dict(base)
        for key, value in base.items():
            if value.is_floating_point():
                total = torch.zeros_like(value, dtype=torch.float64)
                for c, expert in zip(setting.coefficients, experts, strict=True):
                    total += self.weight(c, rng) * (expert[key].double() - value.double())
                out[key] = (value.double() + self.size * total).to(value.dtype)
        return out

    def weight(self, coefficient: float, rng: torch.Generator) -> float:
        return coefficient


@dataclass(frozen=True)
class SoundDraws(Sound):
    stochastic: ClassVar[bool] = True

    def weight(self, coefficient: float, rng: torch.Generator) -> float:
        return coefficient * (1 + 0.1 * float(torch.rand((), generator=rng)))


@dataclass(frozen=True)
class SoundPerTask(Sound):
    task_aware: ClassVar[bool] = True

    def made(self, call: Call) -> State:
        assert call.knowledge is not None
        merged = super().made(call)
        chosen = [i for i, c in enumerate(call.setting.coefficients) if c]
        return PerTask(merged, {call.knowledge.tasks()[i]: dict(call.experts[i]) for i in chosen})


@dataclass(frozen=True)
class SoundWithData(Sound):
    access: ClassVar[Access] = Access.UNLABELED

    def made(self, call: Call) -> State:
        assert call.knowledge is not None
        seen = call.knowledge.unlabeled(2, call.rng)[call.knowledge.tasks()[0]]
        total = sum(float(value.double().sum()) for value in seen.values())
        shifted = Setting(tuple(c * (1 + 1e-3 * total) for c in call.setting.coefficients))
        return super().made(call._replace(setting=shifted))


BROKEN: list[tuple[type[Merger], set[str]]] = []


def breaks(*names: str) -> Callable[[type], type]:
    """The class fails exactly the checks called ``names``."""

    def note(cls: type) -> type:
        BROKEN.append((cls, set(names)))
        return cls

    return note


@breaks("search-space")
@dataclass(frozen=True)
class TriesTwice(Sound):
    def search_space(self, members: int) -> list[Setting]:
        return [*super().search_space(members), Setting((1.0,) * members)]


@breaks("search-space")
@dataclass(frozen=True)
class LeavesEverybodyOut(Sound):
    def search_space(self, members: int) -> list[Setting]:
        return [*super().search_space(members), Setting((0.0,) * members)]


@breaks("search-space")
@dataclass(frozen=True)
class OneCoefficientForAll(Sound):
    def search_space(self, members: int) -> list[Setting]:
        return [*super().search_space(members), Setting((1.0,))]


_counter = itertools.count(1)


@breaks("search-space")
@dataclass(frozen=True)
class OtherSettingsEachTime(Sound):
    def search_space(self, members: int) -> list[Setting]:
        first, last = super().search_space(members)
        return [first, Setting((1e-9 * next(_counter), 0.0, 0.0)[:members]), last]


@breaks("left-out")
@dataclass(frozen=True)
class LooksAtEverybody(Sound):
    def weight(self, coefficient: float, rng: torch.Generator) -> float:
        return coefficient + 0.01


@breaks("left-out")
@dataclass(frozen=True)
class CountsEverybody(Sound):
    """Divides by how many models there are, used or not."""

    def made(self, call: Call) -> State:
        shares = Setting(tuple(c / len(call.experts) for c in call.setting.coefficients))
        return super().made(call._replace(setting=shares))


class _Prepared(Sound):
    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        tries = itertools.count()

        def merged(setting: Setting) -> State:
            factor = self.factor(next(tries))
            other = Setting(tuple(factor * c for c in setting.coefficients))
            return self.merge(base, experts, other, knowledge, rng)

        return merged

    @abstractmethod
    def factor(self, tried: int) -> float: ...


@breaks("order-of-settings")
@dataclass(frozen=True)
class GrowsTired(_Prepared):
    def factor(self, tried: int) -> float:
        return 0.9**tried


@breaks("order-of-settings")
@dataclass(frozen=True)
class PreparesAnotherMerge(_Prepared):
    def factor(self, tried: int) -> float:
        return 0.9


@breaks("stochastic", "left-out")
@dataclass(frozen=True)
class DrawsInSecret(SoundDraws):
    stochastic: ClassVar[bool] = False


@breaks("no-task-vectors")
@dataclass(frozen=True)
class MovesTheBase(Sound):
    def made(self, call: Call) -> State:
        merged = super().made(call)
        return {
            key: 1.5 * value if value.ndim > 1 and value.is_floating_point() else value
            for key, value in merged.items()
        }


@breaks("members")
@dataclass(frozen=True)
class TwoOnly(Sound):
    """It says that it merges three."""

    def made(self, call: Call) -> State:
        if len(call.experts) > 2:
            raise ValueError("too many")
        return super().made(call)


@breaks("convolutions")
@dataclass(frozen=True)
class CountsInFractions(Sound):
    """Counters of a batch norm come out as floating-point numbers."""

    def made(self, call: Call) -> State:
        merged = super().made(call)
        return {k: v if v.is_floating_point() else v.float() for k, v in merged.items()}


@breaks("skill", "members")
@dataclass(frozen=True)
class Explodes(Sound):
    """Finite weights, and logits that are not."""

    size: float = 1e30


@breaks("same-tensors")
@dataclass(frozen=True)
class SeveralModels(Sound):
    """Needs to be told the task, and does not say so."""

    def made(self, call: Call) -> State:
        merged = super().made(call)
        return PerTask(merged, {"first": dict(merged)})


@breaks("access-tier")
@dataclass(frozen=True)
class AsksForLabels(SoundWithData):
    def made(self, call: Call) -> State:
        assert call.knowledge is not None
        with contextlib.suppress(AccessError):
            call.knowledge.labeled(1, call.rng)
        return super().made(call)


@breaks("budget")
@dataclass(frozen=True)
class StepsForFree(SoundWithData):
    def made(self, call: Call) -> State:
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.ones(1)
        torch.optim.SGD([weight], lr=0.1).step()
        return super().made(call)
