"""What all entries of a suite share, whatever they defend: two that disagree cannot both be right.

The undefended expert merges as it does, base and experts answer as they do, and what a free-rider
has without the release does not hang on it. Which of two entries lies is not decided by how many
say the same: whoever invents one entry can invent five. ``verify --rerun`` decides it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from benchmark.core.errors import UnmergeBenchError
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from leaderboard import folder
from leaderboard.checks import Place, buys_nothing, place, words
from leaderboard.entry import Entry
from leaderboard.noise import Leaning, difference, flips

#: Groups of outcomes that no defense has a part in.
GROUPS = ("undefended", "reference", "expert", "base")
#: Facts of a cell that are the suite's and its methods', not the defense's.
_FACTS = ("access", "task_id", "one_coefficient", "n_val", "n_test", "qk_gauge")
#: First word of the outside options that are the release itself.
RELEASED = "released"


class Dispute(NamedTuple):
    """Two entries that contradict each other: what about, and in which cells."""

    other: str
    about: str
    places: tuple[Place, ...]

    def __str__(self) -> str:
        return f"contradicts {self.other}: {self.about}"


def disputes(entry: Entry, others: Iterable[Entry]) -> list[Dispute]:
    """Where an entry contradicts others of the same question; those of another are left out."""
    return [
        Dispute(name(other), about, places)
        for other in others
        if other.question == entry.question
        for about, places in _between(entry, other)
    ]


def beside(entry: Entry, entries: Path) -> list[Entry]:
    """The other entries that stand in a folder and answer the same question.

    Raises:
        Malformed: a file there is no entry.
    """
    return [
        other
        for _, other in folder.everything(entries)
        if other.stands and other.question == entry.question and name(other) != name(entry)
    ]


def consistent(entries: Path) -> None:
    """Refuse a folder in which entries that stand contradict each other.

    Raises:
        UnmergeBenchError: two do; names the first pair of each question.
        Malformed: a file there is no entry.
    """
    by_question: dict[str, list[Entry]] = defaultdict(list)
    for _, entry in folder.everything(entries):
        if entry.stands:
            by_question[entry.question].append(entry)
    for found in by_question.values():
        for one, other in combinations(found, 2):
            for about, _ in _between(one, other):
                raise UnmergeBenchError(
                    f"{name(one)} and {name(other)} contradict each other: {about}; find out which "
                    "is wrong with `unmergebench verify ENTRY --rerun 3` and mark it as invalidated"
                )


def name(entry: Entry) -> str:
    """An entry for people."""
    return f"{entry.defense.spec} {entry.version}"


def _between(entry: Entry, other: Entry) -> Iterator[tuple[str, tuple[Place, ...]]]:
    theirs = {place(cell): cell for cell in other.cells if measured(cell)}
    pairs = [
        (cell, theirs[place(cell)])
        for cell in entry.cells
        if measured(cell) and place(cell) in theirs
    ]
    yield from _facts(pairs)
    for group in (*GROUPS, "outside"):
        yield from _outcomes(group, pairs)


def _facts(pairs: Sequence[tuple[Cell, Cell]]) -> Iterator[tuple[str, tuple[Place, ...]]]:
    for fact in _FACTS:
        apart = [(a, b) for a, b in pairs if getattr(a, fact) != getattr(b, fact)]
        if apart:
            one, its = apart[0]
            yield (
                f"{fact} of {words(one)} is {getattr(one, fact)} here, {getattr(its, fact)} there",
                _where(apart),
            )


def _outcomes(
    group: str, pairs: Sequence[tuple[Cell, Cell]]
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    if group in ("outside", "reference"):
        pairs = [pair for pair in pairs if _same_means(*pair)]
    if group == "outside":
        # What the release adds to it differs from defense to defense.
        pairs = [p for p in pairs if not any(c.outside_choice.startswith(RELEASED) for c in p)]
    leaning, far = Leaning(), []
    for one, its in pairs:
        for task, text in one.correct[group].items():
            gap = difference(text, its.correct[group][task])
            leaning.add(task, text, its.correct[group][task])
            if not gap.size or abs(gap).sum() > flips(len(gap)):
                far.append((one, its, task, int(abs(gap).sum()), len(gap)))
    if far:
        one, _, task, differ, n = far[0]
        how = f"{differ} of {n}" if n else "the number of"
        more = f", and in {len(far) - 1} more places" if len(far) > 1 else ""
        yield (
            f"{how} outcomes of {group} on {task} differ in {words(one)}{more}; {flips(n)} may",
            _where([(a, b) for a, b, *_ in far]),
        )
    elif problem := leaning.problem:
        yield f"outcomes of {group} {problem}", _where(pairs)


def _same_means(one: Cell, its: Cell) -> bool:
    """Whether both free-riders bought the same: an ensemble that stops at once buys nothing."""
    stopped = one.ensemble.get("stopped") == its.ensemble.get("stopped")
    return stopped or buys_nothing(one.attack)


def _where(pairs: Sequence[tuple[Cell, Cell]]) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(place(cell) for cell, _ in pairs))
