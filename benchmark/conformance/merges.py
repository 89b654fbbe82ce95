"""A merger on the tiny testbeds: experts of different tasks, and a Knowledge that keeps a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmark.api.contracts import Access, Knowledge, Merger, Setting
from benchmark.conformance.case import Device, Result, data_of
from benchmark.conformance.scenes import FreeRiderCase, Logged, knowing, tasks_of
from benchmark.conformance.subjects import copies, expert
from benchmark.conformance.testbed import Tiny
from benchmark.core.data import Task
from benchmark.core.state import ForeignState, PerTask, State
from benchmark.merging.layers import by_layer


@dataclass(frozen=True)
class Merging:
    """What one call of a merger is given; the victim's expert comes first."""

    base: State
    experts: tuple[State, ...]
    knowledge: Logged
    tasks: dict[str, Task]


class MergeCase(FreeRiderCase[Merger, Merging]):
    """One merger under check, told what the pipeline would tell it."""

    def inputs(
        self, testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Merging:
        return self.scene(testbed, dtype=dtype, device=device)

    def scene(
        self,
        testbed: Tiny | None = None,
        *,
        access: Access | None = None,
        members: Sequence[str] = ("first", "second"),
        hide: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Merging:
        """Fresh inputs; ``members``: the tasks whose experts are merged."""
        testbed = testbed or self.testbed
        granted = self.method.access if access is None else access
        tasks = tasks_of(testbed, members, granted, hide=hide, device=device)
        base = copies(testbed.base(), dtype, device)
        experts = tuple(copies(expert(testbed, name), dtype, device) for name in members)
        knowledge = knowing(
            testbed, tasks, granted, base, experts[1:], task_id=self.method.task_aware
        )
        return Merging(base, experts, knowledge, tasks)

    def prepared(
        self, inputs: Merging, rng: torch.Generator, method: Merger | None = None
    ) -> Callable[[Setting], State]:
        """``setting → merged State``, as the pipeline makes it."""
        method = method or self.method
        merged = method.prepare(inputs.base, inputs.experts, self.told(inputs), rng)
        return lambda setting: by_layer(merged, inputs.base, setting)

    def merged(self, inputs: Merging, setting: Setting, seed: int = 0) -> State:
        """One merge of ``inputs``."""
        return self.prepared(inputs, torch.Generator().manual_seed(seed))(setting)

    @property
    def knows(self) -> bool:
        """Whether it is told more than the weights."""
        return self.method.access > Access.WEIGHTS or self.method.task_aware

    def told(self, inputs: Merging) -> Knowledge | None:
        """The Knowledge it gets, if it asks for one."""
        return inputs.knowledge if self.knows or self.method.reads_anatomy else None

    def tried(self, members: int = 2) -> list[Setting]:
        """Of its search space, the first and last setting that merge everybody."""
        everybody = [
            setting
            for setting in self.method.search_space(members)
            if len(setting.coefficients) == members and all(setting.coefficients)
        ]
        found = everybody or [Setting((1.0,) * members)]  # the check `search-space` tells
        return [found[0], found[-1]] if len(found) > 1 else found

    def call(self, method: Merger, inputs: Merging, rng: torch.Generator) -> Result:
        merge = self.prepared(inputs, rng, method)
        found: Result = {}
        for setting in self.tried():
            found |= self.named(merge(setting), setting)
        return found

    def named(self, merged: State, setting: Setting) -> Result:
        """The State, or those of each task, under the names that messages use."""
        name = f"the merge at {words(setting)}"
        if not (self.method.task_aware and isinstance(merged, PerTask)):
            return {name: merged}
        return {name: merged.common} | {f"{name} for {t}": s for t, s in merged.own.items()}

    def exercise(self, inputs: Merging, rng: torch.Generator) -> None:
        merge = self.prepared(inputs, rng)
        for setting in self.tried():
            merge(setting)

    def states(self, inputs: Merging) -> tuple[State, ...]:
        return inputs.base, *inputs.experts

    def given(self, inputs: Merging) -> dict[str, State]:
        states = {"base": inputs.base}
        states |= {f"expert {i}": state for i, state in enumerate(inputs.experts, start=1)}
        return states | data_of(inputs.tasks.values())

    @property
    def several(self) -> bool:
        return self.method.task_aware


def plain(state: State) -> bool:
    """Whether it is one model of the base's architecture, whose tensors compare."""
    return not isinstance(state, (ForeignState, PerTask))


def words(setting: Setting) -> str:
    """A setting in a few characters."""
    return ", ".join(
        [
            *(f"{c:g}" for c in setting.coefficients),
            *(f"{name} {value:g}" for name, value in setting.parameters.items()),
            *(["by layer"] if setting.layers else []),
        ]
    )
