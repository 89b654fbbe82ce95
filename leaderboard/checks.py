"""What must hold of an entry: found out from the entry alone, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmark import methods
from benchmark.errors import UsageError
from benchmark.evaluation.scoring import (
    UTILITY_GATE,
    accuracies,
    benefit,
    gain,
    normalized,
    protection,
)
from benchmark.evaluation.statistics import ratio_protection, unpack_bits
from benchmark.pipeline import suite as suites
from benchmark.pipeline.plan import unique
from benchmark.pipeline.suite import Suite
from benchmark.records import Cell
from leaderboard.entry import Entry

#: Figures are recomputed from the same outcomes by the same arithmetic.
EXACTLY = 1e-9
_OUTCOMES = ("attacked", "undefended", "outside", "expert")

Place = tuple[str, tuple[str, ...], int, str, str]


def problems(entry: Entry) -> list[str]:
    """Everything that is wrong, in words for people; empty for a sound entry."""
    return [
        *_of_suite(entry),
        *_of_places(entry),
        *_of_subjects(entry),
        *(f"{words(c)}: {problem}" for c in _all(entry) for problem in _of_cell(entry, c)),
        *_of_flags(entry),
    ]


def _all(entry: Entry) -> Iterator[Cell]:
    yield from entry.cells
    for certificate in entry.certificates:
        yield from certificate.cells


def asked_of(suite: Suite, spec: str) -> Suite:
    """The suite with ``spec`` as its only defense: what an entry answers."""
    return suite.model_copy(update={"defenses": (spec,)})


def place(cell: Cell) -> Place:
    """Where a cell stands in the suite."""
    return cell.victim, tuple(cell.partners), cell.seed, cell.attack, cell.merger


def mandatory(suite: Suite) -> list[Place]:
    """Every place of a suite, for one defense.

    Raises:
        UsageError: an attack or merger that is not known here.
    """
    attacks = unique(methods.attack(spec) for spec in suite.attacks)
    mergers = unique(methods.merger(spec) for spec in suite.mergers)
    return [
        (group.victim, tuple(group.partners), seed, attack.spec, merger.spec)
        for group in suite.groups
        for seed in suite.seeds
        for attack in attacks
        for merger in mergers
    ]


def _of_suite(entry: Entry) -> Iterator[str]:
    suite, spec = entry.suite.definition, entry.defense.spec
    if suite.defenses != (spec,):
        yield f"the suite asks about {', '.join(suite.defenses)}, the entry is about {spec}"
    if not entry.version.startswith(f"{entry.suite.name}-"):
        yield f"version {entry.version} is not one of suite {entry.suite.name}"
    if entry.suite.name not in suites.builtin():
        yield f"suite {entry.suite.name!r} is not one that ships with UnmergeBench"
    elif asked_of(suites.load(entry.suite.name), spec).hash != entry.suite.hash:
        yield f"suite {entry.suite.name} was changed, or is of another version than the one here"


def _of_places(entry: Entry) -> Iterator[str]:
    try:
        wanted = mandatory(entry.suite.definition)
    except UsageError as error:
        yield str(error)
        return
    found = [place(cell) for cell in entry.cells]
    if len(set(found)) != len(found):
        yield f"{len(found) - len(set(found))} cells stand twice"
    missing = [p for p in wanted if p not in set(found)]
    for where in missing[:5]:
        yield f"cell missing: {_words(where)}"
    if len(missing) > 5:
        yield f"{len(missing) - 5} more cells are missing"
    for where in sorted(set(found) - set(wanted), key=str)[:5]:
        yield f"cell the suite does not ask for: {_words(where)}"


def _of_subjects(entry: Entry) -> Iterator[str]:
    subjects = entry.subjects
    victims = {group.victim for group in entry.suite.definition.groups}
    if lost := victims - subjects.experts.keys():
        yield f"no hash of the expert for {', '.join(sorted(lost))}"
    for cell in entry.cells:
        if cell.status not in ("ok", "no-benefit"):
            continue
        wanted = {
            "base": subjects.base,
            "expert": subjects.experts.get(cell.victim),
            "released": subjects.released.get(f"{cell.victim}/{cell.seed}"),
        }
        for what, sha256 in wanted.items():
            if getattr(cell.sha256, what) != sha256:
                yield f"{words(cell)}: its {what} is not the one the entry names"


def _of_cell(entry: Entry, cell: Cell) -> Iterator[str]:
    if cell.defense != entry.defense.spec:
        yield f"is about {cell.defense}"
    if cell.testbed != entry.subjects.testbed:
        yield f"is on testbed {cell.testbed}"
    if cell.status == "error":
        yield f"failed: {cell.reason}"
    try:
        attack, merger = methods.attack(cell.attack).method, methods.merger(cell.merger).method
    except UsageError as error:
        yield str(error)
        return
    tier = max(attack.access, merger.access).label
    if cell.access != tier:
        yield f"claims access {cell.access}; its methods have {tier}"
    if cell.task_id != merger.task_aware:
        yield "claims another track than its merger's"
    if cell.status in ("ok", "no-benefit"):
        yield from _of_figures(cell, entry.suite.definition)


def _of_figures(cell: Cell, suite: Suite) -> Iterator[str]:
    """Every figure against the outcomes per example from which it follows."""
    tasks = [cell.victim, *cell.partners]
    if cell.n_test > suite.test or cell.n_test < 1:
        yield f"{cell.n_test} test examples, the suite has at most {suite.test}"
        return
    try:
        outcomes = {
            who: {task: unpack_bits(cell.correct[who][task]) for task in tasks} for who in _OUTCOMES
        }
    except (KeyError, ValueError) as error:
        yield f"outcomes missing or damaged ({error})"
        return
    attacked, expert = outcomes["attacked"], outcomes["expert"]
    sizes = {task: len(bits) for task, bits in expert.items()}
    if any(len(bits) != sizes[task] for who in outcomes.values() for task, bits in who.items()):
        yield "outcomes of different lengths"
        return
    if sizes[cell.victim] != cell.n_test or not all(bits.any() for bits in expert.values()):
        yield "outcomes that do not fit the number of test examples"
        return
    own = accuracies(expert)
    gains = {w: gain(outcomes[w], expert) for w in ("attacked", "undefended", "outside")}
    pairs: list[tuple[str, Any, Any]] = [
        ("accuracy", cell.accuracy, accuracies(attacked)),
        ("expert_accuracy", cell.expert_accuracy, own),
        ("normalized", cell.normalized, normalized(accuracies(attacked), own)),
        ("gain", cell.gain, gains["attacked"]),
        ("gain_undefended", cell.gain_undefended, gains["undefended"]),
        ("gain_outside", cell.gain_outside, gains["outside"]),
        ("utility_drop", cell.utility_drop, own[cell.victim] - _number(cell.utility)),
    ]
    left = protection(gains["attacked"], gains["undefended"], gains["outside"])
    pairs.append(("protection", cell.protection, left))
    nothing = benefit(gains["undefended"], gains["outside"]) is None
    if nothing != (cell.status == "no-benefit"):
        yield f"status {cell.status} does not follow from its gains"
    elif not nothing:
        interval = ratio_protection(cell.correct, scope=cell.testbed).interval
        pairs.append(("protection_ci", cell.protection_ci, interval))
    for name, stated, follows in pairs:
        if not _same(stated, follows):
            yield f"{name} does not follow from its outcomes"
    if not 0 <= _number(cell.utility) <= 1:
        yield "utility is no share"
    if (_number(cell.utility_drop) > UTILITY_GATE) != ("utility-gate" in cell.flags):
        yield "flag utility-gate does not follow from its utility"


def _of_flags(entry: Entry) -> Iterator[str]:
    raised = flags(entry.cells, entry.defense.spec, lambda spec: entry.defense.card)
    if set(entry.flags) != set(raised):
        stated, found = (", ".join(names) or "none" for names in (entry.flags, raised))
        yield f"states flags {stated}; its cells raise {found}"


def flags(cells: Iterable[Cell], spec: str, cards: Callable[[str], Any]) -> list[str]:
    """The flags of one defense."""
    from leaderboard.runs import board

    return next(row.flags for row in board(cells, cards).rows if row.defense == spec)


def _same(stated: Any, follows: Any) -> bool:
    if isinstance(follows, dict):
        return (
            isinstance(stated, dict)
            and stated.keys() == follows.keys()
            and all(_same(stated[key], value) for key, value in follows.items())
        )
    if isinstance(follows, tuple):
        return stated is not None and all(map(_same, stated, follows))
    if follows is None or stated is None:
        return stated is follows
    return bool(np.isclose(stated, follows, rtol=0, atol=EXACTLY))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def words(cell: Cell) -> str:
    """Where a cell stands, for people."""
    return _words(place(cell))


def _words(where: Place) -> str:
    victim, partners, seed, attack, merger = where
    return f"{victim} + {', '.join(partners)}, seed {seed}, {attack} × {merger}"
