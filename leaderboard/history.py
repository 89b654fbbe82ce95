"""What a pull request may do to a folder of entries: add versions, and mark those that are there.

    python -m leaderboard.history OLD NEW

compares two folders of entries, prints the entries of NEW that there is something to verify about,
one path a line, and exits with 1, each problem a line on stderr, if history was rewritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leaderboard import folder, strict
from leaderboard.entry import Entry

#: What may change in an entry that stands in the folder already.
MARKS = {"superseded_by", "invalidated", "certificates"}


class Changes(NamedTuple):
    """``touched``: entries of the new folder to verify, added or with another certificate (a mark
    adds nothing to verify, and the suite of an old entry may be gone). ``problems``: what must not
    be."""

    touched: list[Path]
    problems: list[str]


def compare(old: Path, new: Path) -> Changes:
    """What lies between two folders of entries. A folder that does not exist is empty."""
    touched: list[Path] = []
    problems = [*_strangers(new)]
    before, after = (_entries(place) for place in (old, new))
    problems += [f"{name} was removed; mark it as invalidated instead" for name in before - after]
    for name in sorted(after):
        path = new / name
        if path.is_symlink() or path.parent.is_symlink():
            continue  # a stranger
        try:
            data = strict.read(path)
            known = strict.read(old / name) if name in before else None
            if data == known:
                continue
            entry = folder.parse(data, str(name))
            was = None if known is None else folder.parse(known, f"{name} as it was")
            wrong = list(_rewritten(was, entry)) if was else list(_added(name, entry, before))
            if was is None or was.certificates != entry.certificates:
                touched.append(path)
            for other, found in folder.versions(path.parent):
                wrong += [f"({other.name}) {p}" for p in folder.misplaced(other, found)]
        except strict.Malformed as error:
            wrong = [str(error)]
        problems += [f"{name}: {problem}" for problem in wrong]
    return Changes(touched, sorted(set(problems)))


def _entries(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.glob("*/*.json")}


def _rewritten(was: Entry, now: Entry) -> Iterator[str]:
    """What differs beyond the marks, and marks that were taken back."""
    for field in Entry.model_fields:
        if field not in MARKS and getattr(was, field) != getattr(now, field):
            yield f"{field} changed; scores change with a new version only: submit the run again"
    for mark in ("superseded_by", "invalidated"):
        if (said := getattr(was, mark)) and getattr(now, mark) != said:
            yield f"{mark} was taken back or changed"
    if now.certificates[: len(was.certificates)] != was.certificates:
        yield "a certificate was removed or changed"


def _added(name: str, entry: Entry, before: set[str]) -> Iterator[str]:
    """A new version follows the last of its suite."""
    home = name.rpartition("/")[0]
    numbers = [
        int(number)
        for stem in (n.removeprefix(f"{home}/").removesuffix(".json") for n in before)
        for suite, _, number in [stem.rpartition("-")]
        if suite == entry.suite.name and number.isdigit()
    ]
    if numbers and entry.number <= max(numbers):
        yield f"version {entry.version} is not later than {entry.suite.name}-{max(numbers)}"


def _strangers(place: Path) -> Iterator[str]:
    """Files that have no business in a folder of entries."""
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if path.is_symlink():
            yield f"{name} is a link"
        elif path.is_dir():
            if len(name.parts) > 1:
                yield f"{name} is a folder within an entry's"
        elif name.parts not in ((".lock",), (".gitkeep",)) and not (
            len(name.parts) == 2 and (name.name == "README.md" or name.suffix == ".json")
        ):
            yield f"{name} is neither an entry nor its README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of ``python -m leaderboard.history``."""
    parser = argparse.ArgumentParser(prog="leaderboard.history", description=compare.__doc__)
    parser.add_argument("old", type=Path, help="the entries as they are")
    parser.add_argument("new", type=Path, help="the entries as proposed")
    places = parser.parse_args(arguments)
    if not places.new.is_dir():
        parser.error(f"{places.new} is no folder of entries")
    changes = compare(places.old, places.new)
    for path in changes.touched:
        print(path)
    for problem in changes.problems:
        print(ascii(problem).strip("'\""), file=sys.stderr)
    return 1 if changes.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
