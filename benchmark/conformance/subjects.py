"""A defense on the tiny testbeds, and the experts that all checks start from."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch

from benchmark.api.contracts import Defense, Victim
from benchmark.api.recipe import Loss, Recipe
from benchmark.conformance.case import Case, Device, Result
from benchmark.conformance.guards import reseed
from benchmark.conformance.testbed import Architecture, Tiny
from benchmark.core.data import Split, Task
from benchmark.core.state import State, digest
from benchmark.evaluation.accuracy import Evaluator
from benchmark.learn.training import fine_tune


@functools.cache
def expert(testbed: Tiny, task: str) -> State:
    """An expert of a tiny testbed. Shared: hand out copies."""
    what = testbed.task(task)
    rng = torch.Generator().manual_seed(1)
    return fine_tune(testbed, {task: what}, testbed.base(), {task: what.train}, rng)


def copies(state: State, dtype: torch.dtype, device: Device) -> State:
    """``state`` in memory of its own; ``dtype`` is for what is floating-point."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        for key, value in state.items()
    }


def victim(testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Victim:
    """The owner's side of the first task, sharing no memory with any other call's."""
    task = testbed.task(testbed.tasks[0]).to(device)

    def ours(state: State) -> State:
        return copies(state, dtype, device)

    def train(
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
        *,
        recipe: Recipe | None = None,
        loss: Loss | None = None,
    ) -> State:
        return fine_tune(testbed, {task.name: task}, start, examples, rng, recipe=recipe, loss=loss)

    return Victim(
        base=ours(testbed.base()),
        expert=ours(expert(testbed, task.name)),
        anatomy=testbed.anatomy(),
        task=task,
        recipe=testbed.recipe,
        fine_tune=train,
        initialise=lambda rng: ours(testbed.initialise(rng)),
        features=testbed.features,
        module=testbed.module(),
    )


class DefenseCase(Case[Defense, Victim]):
    """One defense under check."""

    def inputs(
        self, testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Victim:
        return victim(testbed, dtype=dtype, device=device)

    def call(self, method: Defense, inputs: Victim, rng: torch.Generator) -> Result:
        return {"the release": method.protect(inputs, rng)}

    def exercise(self, inputs: Victim, rng: torch.Generator) -> None:
        release = self.method.protect(inputs, rng)
        self.method.shipped(inputs, release, rng)

    def states(self, inputs: Victim) -> tuple[State, ...]:
        return inputs.base, inputs.expert

    def fingerprint(self, inputs: Victim) -> dict[str, str]:
        states = {"base": inputs.base, "expert": inputs.expert}
        return {name: digest(state) for name, state in states.items()} | data_of([inputs.task])

    @property
    def trains(self) -> bool:
        return self.method.card.trains

    def released(self, architecture: Architecture) -> State:
        """The release on a tiny model under seed 0, made once; raises what it raised."""
        return self.on(architecture)["the release"]

    def shipped(self, architecture: Architecture, seed: int = 0) -> State:
        """What users of the release of :meth:`released` run."""
        reseed(0)
        owner, rng = victim(Tiny(architecture)), torch.Generator().manual_seed(seed)
        return self.method.shipped(owner, self.released(architecture), rng)


def logits(architecture: Architecture, state: State, task: str = "first") -> torch.Tensor:
    """Logits on a task's test split, by the State's own forward pass if it has one."""
    evaluator = Evaluator(Tiny(architecture), torch.device("cpu"))
    return evaluator.logits(state, task, "test", range(len(evaluator.task(task).test)))


def accuracy(architecture: Architecture, state: State, task: str = "first") -> float:
    """Test accuracy on a task."""
    labels = Tiny(architecture).task(task).test.labels
    return float((logits(architecture, state, task).argmax(1) == labels).float().mean())


def data_of(tasks: Iterable[Task]) -> dict[str, str]:
    """Hashes of what tasks hold, by name."""
    found = {}
    for task in tasks:
        found[f"head of {task.name}"] = digest({"head": task.head})
        for name in ("train", "validation", "test"):
            found[f"{name} split of {task.name}"] = task.split(name).digest()
    return found
