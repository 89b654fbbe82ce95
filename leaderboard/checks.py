"""What must hold of an entry: found out from the entry alone, without running anything.

Nothing the entry names is resolved before it is known to be built in (:mod:`leaderboard.trust`).
:mod:`leaderboard.figures` says which figures are recomputed and which are only bounded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmark.api.contracts import Access
from benchmark.core.errors import UsageError
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from benchmark.pipeline import plan as planning
from benchmark.pipeline import suite as suites
from benchmark.pipeline.plan import unique
from benchmark.pipeline.suite import Suite
from leaderboard import figures, trust
from leaderboard.certificates import same_release, without_merit
from leaderboard.entry import Certificate, Entry, asked_of
from leaderboard.noise import difference, flips

Place = tuple[str, tuple[str, ...], int, str, str]


def problems(entry: Entry) -> list[str]:
    """Everything that is wrong, in words for people; empty for a sound entry.

    An entry that does not answer a suite of this version is not looked at any further.
    """
    if found := list(_of_suite(entry)):
        return found
    found = [*_of_places(entry), *_of_subjects(entry), *_of_sharing(entry)]
    wanted = set(_asked(entry))
    found += _of_cells(entry, [cell for cell in entry.cells if place(cell) in wanted])
    for number, certificate in enumerate(entry.certificates, start=1):
        found += [f"certificate {number}: {p}" for p in _of_certificate(entry, certificate)]
    # Flags and merit are taken from all cells together, which must be sound for that.
    return found or [*_of_flags(entry), *without_merit(entry)]


def place(cell: Cell) -> Place:
    """Where a cell stands in the suite."""
    return cell.victim, tuple(cell.partners), cell.seed, cell.attack, cell.merger


def mandatory(suite: Suite, *, changes_modules: bool = False) -> list[Place]:
    """Every place of a suite, for one defense.

    Raises:
        UsageError: an attack or merger that does not ship with UnmergeBench.
    """
    attacks = planning.attacks(suite, changes_modules=changes_modules, resolve=trust.attack)
    mergers = unique(trust.merger(spec) for spec in suite.mergers)
    return [
        (group.victim, tuple(group.partners), seed, attack.spec, merger.spec)
        for group in suite.groups
        for seed in suite.seeds
        for attack in attacks
        for merger in mergers
    ]


def _asked(entry: Entry) -> list[Place]:
    """The places that the entry's suite asks of a defense of its track."""
    foreign = any(cell.changes_modules for cell in entry.cells)
    return mandatory(entry.suite.definition, changes_modules=foreign)


def _of_suite(entry: Entry) -> Iterator[str]:
    suite, spec = entry.suite.definition, entry.defense.spec
    if entry.suite.name not in suites.builtin():
        yield f"suite {entry.suite.name!r} is not one that ships with UnmergeBench"
        return
    if suite.defenses != (spec,):
        yield f"the suite does not ask about {spec} alone"
    elif asked_of(suites.load(entry.suite.name), spec).hash != entry.suite.hash:
        yield f"suite {entry.suite.name} was changed, or is of another version than the one here"
    if entry.version.rpartition("-")[0] != entry.suite.name:
        yield f"version {entry.version} is not one of suite {entry.suite.name}"
    if entry.subjects.testbed != trust.testbed(suites.load(entry.suite.name).testbed).spec:
        yield f"is on testbed {entry.subjects.testbed}, which is not the suite's"


def _of_places(entry: Entry) -> Iterator[str]:
    wanted = _asked(entry)
    found = [place(cell) for cell in entry.cells]
    if len(set(found)) != len(found):
        yield f"{len(found) - len(set(found))} cells stand twice"
    missing = [p for p in wanted if p not in set(found)]
    yield from (f"cell missing: {_words(where)}" for where in missing)
    for where in sorted(set(found) - set(wanted), key=str)[:5]:
        yield f"cell the suite does not ask for: {_words(where)}"


def _of_subjects(entry: Entry) -> Iterator[str]:
    subjects, suite = entry.subjects, entry.suite.definition
    victims = {group.victim for group in suite.groups}
    for what, stated, wanted in (
        ("expert", subjects.experts, victims),
        ("release", subjects.released, {f"{v}/{seed}" for v in victims for seed in suite.seeds}),
    ):
        if stated.keys() != wanted:
            yield f"hashes of the {what}: {_some(stated.keys() ^ wanted)} missing or not asked for"
    for cell in filter(measured, entry.cells):
        yield from (f"{words(cell)}: {problem}" for problem in _of_hashes(entry, cell))


def _of_hashes(entry: Entry, cell: Cell) -> Iterator[str]:
    wanted = {
        "base": entry.subjects.base,
        "expert": entry.subjects.experts.get(cell.victim),
        "released": entry.subjects.released.get(f"{cell.victim}/{cell.seed}"),
    }
    for what, sha256 in wanted.items():
        if getattr(cell.sha256, what) != sha256:
            yield f"its {what} is not the one the entry names"


def _of_sharing(entry: Entry) -> Iterator[str]:
    """One base, expert or release answers one way in all cells; attacks with weights alone leave
    the outside options as they are."""
    seen: dict[tuple[object, ...], set[object]] = defaultdict(set)
    for cell in filter(measured, entry.cells):
        for who in ("expert", "base"):
            for task, text in cell.correct[who].items():
                seen[f"outcomes of the {who}", task].add(text)
        release = cell.victim, cell.seed
        answered = tuple(sorted(cell.correct["released"].items()))
        seen["outcomes of the release", *release].add(answered)
        for name in ("logit_gap", "bf16_gap", "seen", "changes_modules"):
            seen[f"{name} of the release", *release].add(getattr(cell, name))
        seen["bf16_gap_expert of the expert", cell.victim].add(cell.bf16_gap_expert)
        seen["qk_gauge of the testbed", cell.testbed].add(cell.qk_gauge)
        if buys_nothing(cell.attack):
            group = cell.victim, tuple(cell.partners), cell.seed, cell.merger
            seen["outside_choice of attacks with weights alone", *group].add(cell.outside_choice)
            for who in ("outside", "reference"):
                outcomes = tuple(sorted(cell.correct[who].items()))
                seen[f"outcomes of {who} of attacks with weights alone", *group].add(outcomes)
    for (what, *where), values in seen.items():
        if len(values) > 1:
            yield f"{what} for {', '.join(map(str, where))} differ between cells"


def buys_nothing(spec: str) -> bool:
    """Whether an attack of ours buys nothing: with it a free-rider has the same outside options."""
    try:
        return trust.attack(spec).method.access == Access.WEIGHTS
    except UsageError:
        return False


def _of_cells(entry: Entry, cells: Iterable[Cell]) -> Iterator[str]:
    suite, card = entry.suite.definition, entry.defense.card
    for cell in cells:
        try:
            attack, merger = trust.attack(cell.attack), trust.merger(cell.merger)
        except UsageError as error:
            yield f"{words(cell)}: {error}"
            continue
        if (attack.spec, merger.spec) != (cell.attack, cell.merger):
            yield f"{words(cell)}: not the shortest names of its methods"
            continue
        found = figures.problems(cell, suite, attack.method, merger.method, card)
        yield from (f"{words(cell)}: {problem}" for problem in found)


def _of_certificate(entry: Entry, certificate: Certificate) -> Iterator[str]:
    cells, suite = certificate.cells, entry.suite.definition
    mergers = list(dict.fromkeys(cell.merger for cell in cells))
    wanted = {
        (group.victim, tuple(group.partners), seed, certificate.attack, merger)
        for group in suite.groups
        for seed in suite.seeds
        for merger in mergers
    }
    if {place(cell) for cell in cells} != wanted or len(cells) != len(wanted):
        yield f"its cells are not those of {certificate.attack} on every victim and seed"
    if certificate.merger != ", ".join(mergers):
        yield "names other mergers than its cells"
    yield from _of_cells(entry, cells)
    yield from _of_replay(entry, cells)
    if certificate.same_release != same_release(entry, cells):
        yield "same_release does not follow from its hashes"


def _of_replay(entry: Entry, cells: Iterable[Cell]) -> Iterator[str]:
    """Base and experts are the entry's own, made again: they answer as far as machines agree."""
    own = {
        (who, task): text
        for cell in filter(measured, entry.cells)
        for who in ("expert", "base")
        for task, text in cell.correct[who].items()
    }
    for cell in filter(measured, cells):
        for (who, task), text in own.items():
            if task not in cell.correct[who]:
                continue
            gap = difference(text, cell.correct[who][task])
            if not gap.size or abs(gap).sum() > flips(len(gap)):
                yield f"{words(cell)}: outcomes of the {who} on {task} are not the entry's"


def _of_flags(entry: Entry) -> Iterator[str]:
    raised = flags(entry.cells, entry.defense.spec, lambda spec: entry.defense.card)
    if sorted(entry.flags) != raised:
        stated, found = (", ".join(names) or "none" for names in (entry.flags, raised))
        yield f"states flags {stated}; its cells raise {found}"


def flags(cells: Iterable[Cell], spec: str, cards: Callable[[str], Any]) -> list[str]:
    """The flags of one defense, sorted."""
    from leaderboard.runs import board

    return next(row.flags for row in board(cells, cards).rows if row.defense == spec)


def words(cell: Cell) -> str:
    """Where a cell stands, for people."""
    return _words(place(cell))


def _words(where: Place) -> str:
    victim, partners, seed, attack, merger = where
    return f"{victim} + {', '.join(partners)}, seed {seed}, {attack} × {merger}"[:400]


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])[:200]
