"""A defense on the tiny testbeds, and the experts that all checks start from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from benchmark.api.contracts import Defense, Victim
from benchmark.api.recipe import Loss, Recipe
from benchmark.conformance.case import Case, Device, Result, data_of
from benchmark.conformance.guards import reseed
from benchmark.conformance.testbed import Architecture, Tiny
from benchmark.core.data import Split
from benchmark.core.state import State, forward_of
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


def victim(
    testbed: Tiny,
    *,
    name: str = "first",
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Victim:
    """The owner's side of a task, without its test split: no memory shared with another call's."""
    task = testbed.task(name).to(device).without_test()

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
        loss=testbed.loss,
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
        model = self.method.shipped(inputs, release, rng)
        with torch.no_grad():
            forward_of(model, inputs.features)(model, inputs.task.train.inputs)

    def states(self, inputs: Victim) -> tuple[State, ...]:
        return inputs.base, inputs.expert

    def given(self, inputs: Victim) -> dict[str, State]:
        states = {"base": inputs.base, "expert": inputs.expert}
        return states | data_of([inputs.task])

    def facts(self, inputs: Victim) -> dict[str, Any]:
        held = {f"victim.{name}": value for name, value in vars(inputs).items()}
        return held | {"the recipe": repr(inputs.recipe), "the task": inputs.task.classes}

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

    def shipped_for(self, task: str) -> State:
        """What users run of the release of the expert for ``task``."""
        reseed(0)
        owner, rng = victim(self.testbed, name=task), torch.Generator().manual_seed(0)
        released = self.method.protect(owner, rng)
        return self.method.shipped(owner, released, torch.Generator().manual_seed(0))


def logits(architecture: Architecture, state: State, task: str = "first") -> torch.Tensor:
    """Logits on a task's test split, by the State's own forward pass if it has one."""
    evaluator = Evaluator(Tiny(architecture), torch.device("cpu"))
    return evaluator.logits(state, task, "test", range(len(evaluator.task(task).test)))


def accuracy(architecture: Architecture, state: State, task: str = "first") -> float:
    """Test accuracy on a task."""
    labels = Tiny(architecture).task(task).test.labels
    return float((logits(architecture, state, task).argmax(1) == labels).float().mean())
