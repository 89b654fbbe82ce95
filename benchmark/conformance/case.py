"""One method on the tiny testbeds: fresh inputs for every call, and results that checks share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from benchmark.api.methods import Named
from benchmark.api.specs import parameters
from benchmark.conformance.frame import CheckFailed
from benchmark.conformance.guards import outside, reseed, running
from benchmark.conformance.namespaces import Namespaces
from benchmark.conformance.questions import Owned, asked
from benchmark.conformance.testbed import ARCHITECTURES, Architecture, Tiny, tiny_sources
from benchmark.core.data import Task
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import ForeignState, State, to_device

M = TypeVar("M")
I = TypeVar("I")  # noqa: E741

#: What a method raises to say that it does not work on an architecture or a dtype.
REFUSALS = (MethodError, UsageError)

#: Every State that one call of a method gives, by what messages call it.
Result = dict[str, State]

Device = str | torch.device


@dataclass(frozen=True)
class World:
    """The process before a method came into it."""

    namespaces: Namespaces = field(default_factory=lambda: Namespaces(tiny_sources()))
    running: dict[str, Any] = field(default_factory=running)


class Seen(NamedTuple):
    """What it wrote, deleted, connected to or started, and what its own code asked."""

    effects: list[str]
    questions: list[str]


class Case(ABC, Generic[M, I]):
    """A method of type M under check, which one call gives inputs of type I.

    ``world``: the process before the method's code was imported, if it was just now.
    """

    def __init__(self, named: Named[M], world: World | None = None) -> None:
        self.spec = named.spec
        self.method = named.method
        self.world = world or World()
        self.definitions = self.defined()
        self._results: dict[Architecture, Result | Exception] = {}

    @abstractmethod
    def inputs(
        self, testbed: Tiny, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> I:
        """What one call is given, sharing no memory with any other call's."""

    @abstractmethod
    def call(self, method: M, inputs: I, rng: torch.Generator) -> Result:
        """Everything the method makes of ``inputs``."""

    @abstractmethod
    def exercise(self, inputs: I, rng: torch.Generator) -> None:
        """Run all of it that might write to its inputs."""

    @abstractmethod
    def states(self, inputs: I) -> tuple[State, ...]:
        """The States it is given; the base comes first."""

    @abstractmethod
    def given(self, inputs: I) -> dict[str, State]:
        """The tensors it must not write to, by name: the very dicts that it is handed."""

    @abstractmethod
    def facts(self, inputs: I) -> dict[str, Any]:
        """The rest of what it is handed, by name: objects that must stay the same ones."""

    @property
    @abstractmethod
    def trains(self) -> bool:
        """Whether it trains, which multiplies rounding."""

    @property
    def several(self) -> bool:
        """Whether a State of its result may hold several models: of a task-aware merger."""
        return False

    def excuses_draws(self, inputs: I) -> str | None:
        """Why draws of a finished call need not show in its result, or None."""
        return None

    @property
    def parts(self) -> tuple[Any, ...]:
        """The methods of a chain, or the one there is."""
        found: tuple[Any, ...] = getattr(self.method, "parts", (self.method,))
        return found

    @functools.cached_property
    def seen(self) -> Seen:
        """What it did besides its work when all of it was run, once."""
        inputs = self.inputs(self.testbed)
        with outside() as effects, asked(Owned(self.parts)) as questions:
            self.exercise(inputs, torch.Generator().manual_seed(0))
        return Seen(effects, questions)

    def defined(self) -> dict[str, Any]:
        """What says which method it is: parameters, card and the rest of its class, by name."""
        found: dict[str, Any] = {}
        for part in self.parts:
            name = type(part).__name__
            found |= {f"{name}.{key}": value for key, value in parameters(part).items()}
            found |= {
                f"{name}.{key}": getattr(part, key, None)
                for key in ("card", "access", "version", "candidates", "expected_failed_checks")
            }
        return found

    @functools.cached_property
    def testbed(self) -> Tiny:
        """The first tiny testbed the method does not refuse.

        Raises:
            CheckFailed: it refuses all of them.
        """
        for architecture in ARCHITECTURES:
            try:
                self.on(architecture)
            except REFUSALS as refusal:
                last = refusal
            except Exception:
                return Tiny(architecture)  # the checks tell
            else:
                return Tiny(architecture)
        raise CheckFailed(f"refuses every architecture ({', '.join(ARCHITECTURES)}): {last}")

    @property
    def result(self) -> Result:
        """What it made on :attr:`testbed` under seed 0. Shared: never edit."""
        return self.on(self.testbed.architecture)

    def on(self, architecture: Architecture) -> Result:
        """What it made on a tiny model under seed 0, made once; raises what it raised."""
        if architecture not in self._results:
            try:
                self._results[architecture] = self.run(self.inputs(Tiny(architecture)))
            except Exception as error:
                self._results[architecture] = error
        found = self._results[architecture]
        if isinstance(found, Exception):
            raise found
        return found

    def accepted(self) -> Iterator[Architecture]:
        """The architectures on which there is a result; the check `architectures` tells why not."""
        for architecture in ARCHITECTURES:
            try:
                self.on(architecture)
            except Exception:
                continue
            yield architecture

    def run(
        self,
        inputs: I | None = None,
        *,
        method: M | None = None,
        seed: int = 0,
        world: int | None = 0,
    ) -> Result:
        """One call, on fresh inputs unless given. ``world`` seeds the global generators."""
        if world is not None:
            reseed(world)
        inputs = self.inputs(self.testbed) if inputs is None else inputs
        rng = torch.Generator().manual_seed(seed)
        return self.call(self.method if method is None else method, inputs, rng)

    def on_device(self, device: torch.device) -> Result:
        """The result made on another device, and brought to the CPU.

        Raises:
            CheckFailed: a tensor of it is elsewhere.
        """
        result = self.run(self.inputs(self.testbed, device=device))
        for name, state in result.items():
            for key, value in state.items():
                if value.device.type != device.type:
                    raise CheckFailed(f"on {device}, tensor {key!r} of {name} is on {value.device}")
        return {
            name: ForeignState(to_device(state, "cpu"), state.forward)
            if isinstance(state, ForeignState)
            else to_device(state, "cpu")
            for name, state in result.items()
        }


AnyCase = Case[Any, Any]


def data_of(tasks: Iterable[Task]) -> dict[str, State]:
    """The tensors of tasks, by name, in the very dicts that hold them."""
    found: dict[str, State] = {}
    for task in tasks:
        found[f"head of {task.name}"] = {"head": task.head}
        for name in task.splits:
            split = task.split(name)
            found[f"{name} inputs of {task.name}"] = split.inputs
            found[f"{name} labels of {task.name}"] = {"labels": split.labels}
    return found


def warm_up(case: AnyCase) -> None:
    """Build every tiny model with its experts, so that no check is charged with it."""
    for architecture in ARCHITECTURES:
        case.inputs(Tiny(architecture))
