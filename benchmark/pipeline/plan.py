"""Plan: the cells of a suite, each with the key of everything that determines it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from benchmark.api import methods
from benchmark.api.contracts import Attack, Defense, Merger, Testbed
from benchmark.api.methods import Named
from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UsageError
from benchmark.pipeline.fingerprint import sha, source_hash
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import method_key, testbed_key


@dataclass(frozen=True)
class Planned:
    """One cell to compute."""

    key: str
    group: Group
    seed: int
    defense: Named[Defense]
    attack: Named[Attack]
    merger: Named[Merger]


@dataclass(frozen=True)
class Plan:
    """The cells of one suite, in the order in which they are computed and written."""

    suite: Suite
    testbed: Named[Testbed]
    cells: tuple[Planned, ...]


def unique(parts: Iterable[Named]) -> list[Named]:
    """Methods without repeats (``ties`` and ``ties(density=0.2)`` are one), order kept."""
    return list({part.spec: part for part in parts}.values())


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
    defenses = unique(methods.defense(spec) for spec in suite.defenses)
    attacks = unique(methods.attack(spec) for spec in suite.attacks)
    mergers = unique(methods.merger(spec) for spec in suite.mergers)
    common = [
        testbed_key(testbed.method, device),
        suite.test,
        suite.validation_rungs,
        suite.fixed_coefficients,
        source_hash("benchmark.pipeline.cells"),
        *([mergers[0].spec] if suite.benign else []),  # its cells hold the tax
        *(["fixed_everywhere"] if suite.fixed_everywhere else []),
    ]
    cells = []
    for group, seed, defense in product(suite.groups, suite.seeds, defenses):
        # Attack outside merger: what an attack recovered is in memory for every merger.
        for attack, merger in product(attacks, mergers):
            key = sha(
                "cell", common, group.model_dump(), seed,
                [[m.spec, method_key(m.method)] for m in (defense, attack, merger)],
            )  # fmt: skip
            cells.append(Planned(key, group, seed, defense, attack, merger))
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
