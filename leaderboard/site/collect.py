"""What the page shows, put together from the folder of entries. Nothing is computed elsewhere."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmark.core.errors import UnmergeBenchError
from benchmark.reporting.board import Leaderboard, Row, Tier
from leaderboard import folder
from leaderboard.certificates import best_known
from leaderboard.entry import Certificate, Entry
from leaderboard.runs import board


@dataclass(frozen=True)
class Listed:
    """An entry and its file: ``place`` is its path inside the folder, ``data`` the bytes there."""

    entry: Entry
    place: str
    data: bytes = field(repr=False)

    @property
    def spec(self) -> str:
        """The defense."""
        return self.entry.defense.spec

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def known(self) -> dict[Tier, float]:
        """Best-known protection by tier (clipped); empty without certificates."""
        return best_known(self.entry) if self.entry.certificates else {}

    def leaves(self, certificate: Certificate) -> dict[Tier, float]:
        """What a certificate alone leaves, by tier."""
        alone = {"cells": certificate.cells, "certificates": ()}
        return best_known(self.entry.model_copy(update=alone))


@dataclass(frozen=True)
class Question:
    """A suite, whatever the defense, on one set of data: what makes entries comparable.

    ``board`` ranks the entries that stand; ``rows`` are its rows, each with its entry.
    """

    id: str
    label: str
    listed: tuple[Listed, ...]
    board: Leaderboard

    @property
    def first(self) -> Entry:
        """Any of its entries: they share the suite but for the defense."""
        return self.listed[0].entry

    @property
    def rows(self) -> list[tuple[Row, Listed]]:
        """In the order of the ranking."""
        by_spec = {listed.spec: listed for listed in self.listed}
        return [(row, by_spec[row.defense]) for row in self.board.rows]


def read(entries: Path) -> list[Listed]:
    """All entries, read while nobody writes.

    Raises:
        UnmergeBenchError: no such folder.
        Malformed: a file there is no entry.
    """
    if not entries.is_dir():
        raise UnmergeBenchError(f"{entries} is no folder; `unmergebench submit` makes one")
    with folder.locked(entries):
        return [
            Listed(entry, path.relative_to(entries).as_posix(), path.read_bytes())
            for path, entry in folder.everything(entries)
        ]


def questions(found: Iterable[Listed]) -> list[Question]:
    """The entries that stand, by what they answer; the question with most answers first."""
    groups: dict[str, dict[str, Listed]] = defaultdict(dict)
    for listed in sorted(found, key=lambda one: (one.entry.created, one.place)):
        if listed.entry.stands:
            groups[listed.entry.question][listed.spec] = listed  # the last one counts
    names = Counter(next(iter(group.values())).entry.suite.name for group in groups.values())
    made = [_question(key, list(group.values()), names) for key, group in groups.items()]
    return sorted(made, key=lambda question: (-len(question.listed), question.label))


def _question(key: str, listed: Sequence[Listed], names: Counter[str]) -> Question:
    cards = {one.spec: one.entry.defense.card for one in listed}
    name = listed[0].entry.suite.name
    return Question(
        id=key[:12],
        label=name if names[name] == 1 else f"{name} ({key[:7]})",
        listed=tuple(listed),
        board=board([cell for one in listed for cell in one.entry.cells], cards.__getitem__),
    )
