"""A defense that does not ship here, as this process knows it: by what its own process says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError

from benchmark.api import methods
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.api.methods import Named
from benchmark.api.specs import parse, split_composite
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError
from benchmark.core.state import State
from benchmark.pipeline.apart import processes
from benchmark.pipeline.apart.processes import Process


@dataclass(frozen=True)
class Facts:
    """What a defense says of itself. ``spec`` is canonical."""

    spec: str
    card: Card
    changes_modules: bool


@dataclass(frozen=True)
class Apart(Defense):
    """A defense in a process of its own (:func:`protect` and :func:`ship` of this package run it).

    ``identity``: sha256 of what determines its results, besides the victim and the seed: classes,
    parameters, and the source of everything they import that has no version of its own.
    """

    facts: Facts
    identity: str
    card: ClassVar[Card] = Card("a defense in a process of its own")

    def __post_init__(self) -> None:
        # The class attribute is what the contract asks for; each has its own beside it.
        object.__setattr__(self, "card", self.facts.card)

    @property
    def spec(self) -> str:
        return self.facts.spec

    @property
    def changes_modules(self) -> bool:
        return self.facts.changes_modules

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """Raises MethodError: a Victim alone cannot be sent to another process, a testbed can."""
        raise MethodError(f"{self.spec} runs apart: call benchmark.pipeline.apart.protect")


def defense(spec: str) -> Named[Defense]:
    """The defense behind a spec: itself if all its parts ship here, else as :class:`Apart`.

    Raises:
        UsageError: as :func:`benchmark.api.methods.defense`, in the same words; or it cannot be
            imported, or says nothing sensible of itself.
    """
    if methods.DEFENSES.ships(spec):
        return methods.defense(spec)
    before = methods.DEFENSES.fingerprint(spec)
    process = processes.begin(spec)
    facts = _described(process, spec)
    method = Apart(facts, _identity(facts.spec))
    process.spec = facts.spec
    if methods.DEFENSES.fingerprint(spec) != before:
        raise _edited(spec)
    return Named(facts.spec, method)


def serving(method: Apart, bound: tuple[str, str]) -> Process:
    """A process that runs ``method`` for one victim (testbed, task), and for no other.

    Raises:
        UsageError: its source is not what it was when the run began.
    """
    process = processes.found(method.spec, bound)
    if process is None:
        process = processes.begin(method.spec)
        if _described(process, method.spec) != method.facts:
            process.end()
            raise UsageError(f"{method.spec} says another thing of itself each time it is asked")
        if _identity(method.spec) != method.identity:
            process.end()
            raise _edited(method.spec)
    process.bound = bound
    return process


def _edited(spec: str) -> UsageError:
    return UsageError(f"{spec} was edited while it was running; run again")


def _described(process: Process, spec: str) -> Facts:
    try:
        said = process.ask("describe", spec=spec)
        return _validated(said, spec)
    except UnmergeBenchError as error:
        process.end()
        said_so = isinstance(error, UsageError)
        raise UsageError(str(error) if said_so else f"{spec}: {error}") from None


def _validated(said: dict[str, Any], spec: str) -> Facts:
    try:
        facts = TypeAdapter(Facts).validate_python(said)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{spec}: {where}: {problem['msg']}") from None
    # It may spell its parameters; which code it is, is for the user to say.
    if _names(facts.spec) != _names(spec):
        raise UsageError(f"{spec} calls itself {facts.spec[:200]}")
    return facts


def _names(spec: str) -> list[str]:
    return [parse(part)[0] for part in split_composite(spec)]


def _identity(spec: str) -> str:
    parts = [parse(part) for part in split_composite(spec)]
    # Where its file lies says nothing about what it does.
    named = [[name.rpartition(":")[2], sorted(arguments.items())] for name, arguments in parts]
    source = methods.DEFENSES.fingerprint(spec)
    return hashlib.sha256(repr([named, source]).encode()).hexdigest()
