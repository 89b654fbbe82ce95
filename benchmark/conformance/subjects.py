"""A method on the tiny testbeds: fresh inputs for every call, and results that checks share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from benchmark.checkpoint import State, digest, to_device
from benchmark.conformance.frame import CheckFailed
from benchmark.conformance.guards import reseed
from benchmark.conformance.testbed import ARCHITECTURES, Architecture, Tiny
from benchmark.contracts import Defense, Victim
from benchmark.data import Split
from benchmark.errors import MethodError, UsageError
from benchmark.evaluation.accuracy import Evaluator
from benchmark.methods import Named
from benchmark.training import Loss, Recipe, fine_tune

#: What a method raises to say that it does not work on an architecture or a dtype.
REFUSALS = (MethodError, UsageError)


@functools.cache
def expert(testbed: Tiny, task: str) -> State:
    """An expert of a tiny testbed. Shared: hand out copies."""
    what = testbed.task(task)
    rng = torch.Generator().manual_seed(1)
    return fine_tune(testbed, {task: what}, testbed.base(), {task: what.train}, rng)


def warm_up() -> None:
    """Build every tiny model and its expert."""
    for architecture in ARCHITECTURES:
        expert(Tiny(architecture), "first")


def victim(
    testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Victim:
    """The owner's side of the first task, sharing no memory with any other call's."""
    task = testbed.task(testbed.tasks[0]).to(device)

    def ours(state: State) -> State:
        return {key: value.to(device, dtype, copy=True) for key, value in state.items()}

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


class DefenseCase:
    """One defense under check."""

    def __init__(self, named: Named[Defense]) -> None:
        self.spec = named.spec
        self.method = named.method
        self._released: dict[Architecture, State | Exception] = {}

    @property
    def parts(self) -> tuple[Defense, ...]:
        """The defenses of a chain, or the one there is."""
        found: tuple[Defense, ...] = getattr(self.method, "parts", (self.method,))
        return found

    @functools.cached_property
    def testbed(self) -> Tiny:
        """The first tiny testbed the defense does not refuse.

        Raises:
            CheckFailed: it refuses all of them.
        """
        for architecture in ARCHITECTURES:
            try:
                self.released(architecture)
            except REFUSALS as refusal:
                last = refusal
            except Exception:
                return Tiny(architecture)  # the checks tell
            else:
                return Tiny(architecture)
        raise CheckFailed(f"refuses every architecture ({', '.join(ARCHITECTURES)}): {last}")

    @property
    def release(self) -> State:
        """What it released on :attr:`testbed` under seed 0. Shared: never edit."""
        return self.released(self.testbed.architecture)

    def released(self, architecture: Architecture) -> State:
        """What it released on a tiny model under seed 0, made once; raises what it raised."""
        if architecture not in self._released:
            try:
                self._released[architecture] = self.protect(victim(Tiny(architecture)))
            except Exception as error:
                self._released[architecture] = error
        found = self._released[architecture]
        if isinstance(found, Exception):
            raise found
        return found

    def protect(
        self,
        owner: Victim | None = None,
        *,
        method: Defense | None = None,
        seed: int = 0,
        world: int | None = 0,
    ) -> State:
        """One release, from fresh inputs unless given. ``world`` seeds the global generators."""
        if world is not None:
            reseed(world)
        owner = owner or victim(self.testbed)
        return (method or self.method).protect(owner, torch.Generator().manual_seed(seed))

    def shipped(self, architecture: Architecture, seed: int = 0) -> State:
        """What users of the release of :meth:`released` run."""
        reseed(0)
        owner, rng = victim(Tiny(architecture)), torch.Generator().manual_seed(seed)
        return self.method.shipped(owner, self.released(architecture), rng)

    def on_device(self, device: torch.device) -> State:
        """The release made on another device, and brought to the CPU.

        Raises:
            CheckFailed: a tensor of it is elsewhere.
        """
        state = self.protect(victim(self.testbed, device=device))
        for key, value in state.items():
            if value.device.type != device.type:
                raise CheckFailed(
                    f"on {device}, tensor {key!r} of the release is on {value.device}"
                )
        return to_device(state, "cpu")


def logits(architecture: Architecture, state: State) -> torch.Tensor:
    """Logits on the first task's test split, by the State's own forward pass if it has one."""
    testbed = Tiny(architecture)
    evaluator = Evaluator(testbed, torch.device("cpu"))
    task = testbed.task(testbed.tasks[0])
    return evaluator.logits(state, task.name, "test", range(len(task.test)))


def accuracy(architecture: Architecture, state: State) -> float:
    """Test accuracy on the first task."""
    task = Tiny(architecture).task("first")
    return float((logits(architecture, state).argmax(1) == task.test.labels).float().mean())


def fingerprint(owner: Victim) -> dict[str, Any]:
    """What a defense must not write to, as hashes by name."""
    splits = {name: owner.task.split(name).digest() for name in ("train", "validation", "test")}
    return {
        "base": digest(owner.base),
        "expert": digest(owner.expert),
        "head": digest({"head": owner.task.head}),
        "module": digest(dict(owner.module.state_dict())),
        **splits,
    }
