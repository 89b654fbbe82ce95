"""An attack on the tiny testbeds: a locked release, partners, and a Knowledge that keeps a log."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from benchmark.anatomy import apply_qk, apply_vo, permute_heads, permute_units, within
from benchmark.api.contracts import Access, Attack, Knowledge, Merger
from benchmark.api.methods import merger
from benchmark.api.recipe import Loss, Recipe
from benchmark.conformance.case import Case, Device, Result, data_of
from benchmark.conformance.subjects import copies, expert
from benchmark.conformance.testbed import Tiny
from benchmark.core.data import Split, Task
from benchmark.core.state import ForeignState, State, add, task_vector
from benchmark.learn.training import fine_tune

#: What attacks' mergers are checked with.
MERGER = "task-arithmetic"


@dataclass
class Log:
    """What an attack asked its Knowledge for: (tier, what), and how many examples it was given.

    ``exhausted``: it was given all there are, so that a draw only decided their order.
    """

    asked: list[tuple[Access, str]] = field(default_factory=list)
    examples: int = 0
    exhausted: bool = False


class Logged(Knowledge):
    """Knowledge that writes down what it is asked for, whoever catches the refusal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log = Log()  # shared by the copies that chains make

    def require(self, tier: Access, what: str) -> None:
        self.log.asked.append((tier, what))
        super().require(tier, what)

    def unlabeled(
        self, per_task: int, rng: torch.Generator, *, victim_only: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        found = super().unlabeled(per_task, rng, victim_only=victim_only)
        self._note({name: len(next(iter(inputs.values()))) for name, inputs in found.items()})
        return found

    def labeled(
        self, per_class: int, rng: torch.Generator, *, victim_only: bool = False
    ) -> dict[str, Split]:
        found = super().labeled(per_class, rng, victim_only=victim_only)
        self._note({name: len(split) for name, split in found.items()})
        return found

    def _note(self, given: Mapping[str, int]) -> None:
        self.log.examples += sum(given.values())
        self.log.exhausted |= all(n == len(self._tasks[name].train) for name, n in given.items())


@dataclass(frozen=True)
class Scene:
    """What one call of an attack is given. ``merged`` is a merge for ``refine`` to work on."""

    released: State
    second: State
    merged: State
    knowledge: Logged
    tasks: dict[str, Task]

    def foreign(self, testbed: Tiny) -> Scene:
        """The same where users run other modules than mergers see, with a tensor of their own."""

        def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            return testbed.features({k: v for k, v in state.items() if k in self.released}, inputs)

        extra = {"foreign.constant": next(iter(self.released.values())).new_ones(1)}
        self.knowledge.shipped = ForeignState({**self.released, **extra}, forward)
        return self


@functools.cache
def locked(testbed: Tiny, seed: int = 0) -> State:
    """The first expert after a random element of the gauge group. Shared: hand out copies."""
    rng, state = torch.Generator().manual_seed(seed), dict(expert(testbed, testbed.tasks[0]))
    for block in testbed.anatomy().attention:
        permute_heads(state, block, torch.randperm(block.kv_heads, generator=rng))
        apply_qk(state, block, within(block, _invertible(block.kv_heads, block.head_dim, rng)))
        apply_vo(state, block, _invertible(block.kv_heads, block.head_dim, rng))
    for units in testbed.anatomy().units:
        permute_units(state, units, torch.randperm(units.width(state), generator=rng))
    return state


def scene(
    testbed: Tiny,
    access: Access,
    *,
    partners: int = 1,
    lock: bool = True,
    hide: bool = False,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Scene:
    """Fresh inputs for one call. ``access`` is what is granted.

    ``hide`` changes all that the tier does not give: validation and test splits, and below
    ``labeled`` the training labels.
    """

    def ours(state: State) -> State:
        return copies(state, dtype, device)

    names = testbed.tasks[: 1 + partners]
    tasks = tasks_of(testbed, names, access, hide=hide, device=device)
    first, base = expert(testbed, names[0]), testbed.base()
    second = ours(locked(testbed, 1) if lock else first)

    partners_own = [ours(expert(testbed, name)) for name in names[1:]]
    knowledge = knowing(testbed, tasks, access, ours(base), partners_own, second=lambda: second)
    merged = add(base, task_vector(first, base), 0.5)
    released = ours(locked(testbed) if lock else first)
    return Scene(released, second, ours(merged), knowledge, tasks)


def tasks_of(
    testbed: Tiny, names: Sequence[str], access: Access, *, hide: bool = False, device: Device
) -> dict[str, Task]:
    """Tasks by name; with ``hide``, all that ``access`` does not give is another."""
    tasks = {name: testbed.task(name).to(device) for name in names}
    if hide:
        tasks = {name: _hidden(task, access < Access.LABELED) for name, task in tasks.items()}
    return tasks


def knowing(
    testbed: Tiny,
    tasks: Mapping[str, Task],
    access: Access,
    base: State,
    partners: Sequence[State],
    *,
    second: Callable[[], State] | None = None,
    task_id: bool = False,
) -> Logged:
    """What a method may know that is granted ``access``."""

    def train(
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: Loss | None = None,
    ) -> State:
        return fine_tune(testbed, tasks, start, examples, rng, recipe=recipe, loss=loss)

    return Logged(
        access,
        base,
        partners,
        testbed.anatomy(),
        tasks=tasks if access > Access.WEIGHTS or task_id else None,
        recipe=testbed.recipe,
        fine_tune=train,
        features=testbed.features,
        module=testbed.module(),
        second=second,
        flops_per_example=1.0,
        task_id=task_id,
    )


class Informed(Protocol):
    """Inputs with what the free-rider knows."""

    @property
    def knowledge(self) -> Logged: ...


M = TypeVar("M", Attack, Merger)
I = TypeVar("I", bound=Informed)  # noqa: E741


#: What a Knowledge counts.
_SPENT = ("budget", "log")


class FreeRiderCase(Case[M, I]):
    """A method that a free-rider runs, under check, granted the access it declares."""

    @abstractmethod
    def scene(
        self, testbed: Tiny | None = None, *, access: Access | None = None, hide: bool = False
    ) -> I:
        """Fresh inputs for one call. ``access`` is the declared one unless given; with ``hide``,
        all that it does not give is another."""

    def facts(self, inputs: I) -> dict[str, Any]:
        """All that its Knowledge holds; what it spends is the check `budget`'s."""
        held = vars(inputs.knowledge)
        found = {f"knowledge.{name}": held[name] for name in held if name not in _SPENT}
        return found | {"the recipe": repr(inputs.knowledge.recipe)}

    def excuses_draws(self, inputs: I) -> str | None:
        exhausted = inputs.knowledge.log.exhausted
        return "is given every example there is: draws decide their order" if exhausted else None

    @property
    def trains(self) -> bool:
        return self.method.card.trains or self.method.access > Access.WEIGHTS


class AttackCase(FreeRiderCase[Attack, Scene]):
    """One attack under check."""

    def inputs(
        self, testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Scene:
        return self.scene(testbed, dtype=dtype, device=device)

    def scene(
        self, testbed: Tiny | None = None, *, access: Access | None = None, **options: Any
    ) -> Scene:
        """:func:`scene` with the declared access unless another is given."""
        granted = self.method.access if access is None else access
        return scene(testbed or self.testbed, granted, **options)

    def call(self, method: Attack, inputs: Scene, rng: torch.Generator) -> Result:
        members = method.members(inputs.released, inputs.knowledge, rng)
        result = {"the recovered model": members.released, "the base": members.base}
        for i, partner in enumerate(members.partners, start=1):
            result[f"partner {i}"] = partner
        if method.refines:
            result["the refined model"] = method.refine(inputs.merged, inputs.knowledge, rng)
        return result

    def exercise(self, inputs: Scene, rng: torch.Generator) -> None:
        attack, known = self.method, inputs.knowledge
        members = attack.members(inputs.released, known, rng)
        wrapped = attack.merging(merger(MERGER).method, known.anatomy)
        experts = [members.released, *members.partners]
        merge = wrapped.prepare(members.base, experts, None, rng)
        for setting in wrapped.search_space(len(experts))[-1:]:  # none: the check `merging` tells
            merge(setting)
        attack.refine(inputs.merged, known, rng)

    def states(self, inputs: Scene) -> tuple[State, ...]:
        known = inputs.knowledge
        return known.base, inputs.released, *known.partners, inputs.second, inputs.merged

    def given(self, inputs: Scene) -> dict[str, State]:
        known = inputs.knowledge
        states = {
            "base": known.base,
            "released": inputs.released,
            **{f"partner {i}": partner for i, partner in enumerate(known.partners, start=1)},
            "second release": inputs.second,
            "merged": inputs.merged,
        }
        return states | data_of(inputs.tasks.values())


def _hidden(task: Task, labels: bool) -> Task:
    def other(split: Split) -> Split:
        rows = torch.arange(len(split), device=split.labels.device).flip(0)
        return replace(split[rows], labels=(split.labels + 1) % len(task.classes))

    train = Split(task.train.inputs, other(task.train).labels) if labels else task.train
    return replace(task, train=train, validation=other(task.validation), test=other(task.test))


def _invertible(heads: int, size: int, rng: torch.Generator) -> Tensor:
    """Rotations times scales between 1/2 and 2: (heads, size, size) float64."""
    normal = torch.randn(heads, size, size, generator=rng, dtype=torch.float64)
    scales = 4 ** (torch.rand(heads, size, generator=rng, dtype=torch.float64) - 0.5)
    return torch.linalg.qr(normal).Q * scales[:, None, :]
