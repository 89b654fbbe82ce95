"""Plan: the cells of a suite, each with the key of everything that determines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch

from benchmark.api import methods
from benchmark.api.contracts import Attack, Ensemble, Testbed
from benchmark.api.methods import Named
from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UsageError
from benchmark.core.records import OF_MODULES
from benchmark.pipeline import apart, identity
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.suite import Suite


@dataclass(frozen=True)
class Planned:
    """One cell to compute, and the key of everything that determines it."""

    key: str
    at: Situation


@dataclass(frozen=True)
class Plan:
    """The cells of one suite, in the order in which they are computed and written."""

    suite: Suite
    testbed: Named[Testbed]
    cells: tuple[Planned, ...]


def unique(parts: Iterable[Named]) -> list[Named]:
    """Methods without repeats (``ties`` and ``ties(density=0.2)`` are one), order kept."""
    return list({part.spec: part for part in parts}.values())


def attacks(
    suite: Suite,
    *,
    changes_modules: bool = False,
    resolve: Callable[[str], Named[Attack]] = methods.attack,
) -> list[Named[Attack]]:
    """The attacks that a defense must stand under a suite.

    ``OF_MODULES`` among them where the suite judges, by a standard attacker; one that only measures
    what a paper measured asks no more of anybody.
    """
    asked = unique(resolve(spec) for spec in suite.attacks)
    if changes_modules and any(isinstance(part.method, Ensemble) for part in asked):
        asked = unique([*asked, *(resolve(spec) for spec in OF_MODULES)])
    return asked


def make(suite: Suite, device: torch.device) -> Plan:
    """Resolve every name of a suite.

    Raises:
        UsageError: an unknown name, parameter or task. Nothing was computed yet.
    """
    testbed = methods.testbed(suite.testbed)
    for group in suite.groups:
        for task in (group.victim, *group.partners):
            if task not in testbed.method.tasks:
                hint = did_you_mean(task, testbed.method.tasks)
                raise UsageError(f"testbed {testbed.spec} has no task {task!r}{hint}")
    secrets = {group.victim in testbed.method.duties for group in suite.groups}
    if len(secrets) > 1:
        raise UsageError("a suite asks for skills or for secrets: its victims are of both kinds")
    defenses = unique(apart.defense(spec) for spec in suite.defenses)
    mergers = unique(methods.merger(spec) for spec in suite.mergers)
    asked = {
        changes: attacks(suite, changes_modules=changes)
        for changes in {part.method.changes_modules for part in defenses}
    }
    bench = identity.testbed(testbed.method, device)
    question = identity.question(bench, suite, mergers[0].spec)
    keys = {
        id(part): [part.spec, identity.method(part.method)]
        for part in chain(defenses, mergers, *asked.values())
    }
    cells = []
    for group, seed, defense in product(suite.groups, suite.seeds, defenses):
        # Attack outside merger: what an attack recovered is in memory for every merger.
        for attack, merger in product(asked[defense.method.changes_modules], mergers):
            parts = [keys[id(part)] for part in (defense, attack, merger)]
            key = identity.cell(question, group, seed, parts)
            cells.append(Planned(key, Situation(group, seed, defense, attack, merger)))
    return Plan(suite, testbed, tuple(cells))


def narrowed(
    suite: Suite,
    *,
    defenses: Sequence[str] = (),
    attacks: Sequence[str] = (),
    mergers: Sequence[str] = (),
    victims: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Suite:
    """The suite with parts replaced from the command line. A changed suite has another hash.

    Raises:
        UsageError: no group of the suite has one of ``victims``.
    """
    known = {group.victim for group in suite.groups}
    for victim in victims:
        if victim not in known:
            raise UsageError(
                f"suite {suite.name} has no victim {victim!r}{did_you_mean(victim, known)}"
            )
    changes: dict[str, object] = {
        "defenses": tuple(defenses),
        "attacks": tuple(attacks),
        "mergers": tuple(mergers),
        "seeds": tuple(seeds),
        "groups": tuple(g for g in suite.groups if g.victim in victims),
    }
    changes = {key: value for key, value in changes.items() if value}
    if not changes:
        return suite
    return Suite.model_validate({**suite.model_dump(), **changes, "name": f"{suite.name}-custom"})
