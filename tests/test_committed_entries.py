"""The entries of this repository: all that a reader can hold them to without running anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leaderboard import folder, shared
from leaderboard.paths import ENTRIES
from leaderboard.verify import verify

HERE = Path(__file__).parent.parent / ENTRIES
PATHS = sorted(HERE.glob("*/*.json"))


def stands(path: Path) -> bool:
    """Whether it is of today's rules."""
    try:
        folder.read(path)
    except folder.Older:
        return False
    return True


STANDING = [path for path in PATHS if stands(path)]
OLDER = [path for path in PATHS if path not in STANDING]
PUBLISHED = (
    "params", "params-d", "mergelock", "mergebarrier-attn", "mergebarrier-taylor", "trap2",
    "mergeguard", "arf", "arf+mergelock",
)  # fmt: skip


def place(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("suite", ["quick", "smoke"])
def test_the_published_defenses_have_entries(suite: str) -> None:
    """Of today's rules or of older ones, which do not rank."""
    found = {
        json.loads(path.read_text())["defense"]["spec"].split("(")[0]
        for path in PATHS
        if path.stem.startswith(f"{suite}-")
    }
    assert found >= set(PUBLISHED)


@pytest.mark.parametrize("path", STANDING, ids=[place(path) for path in STANDING])
def test_an_entry_is_sound(path: Path) -> None:
    verdict = verify(folder.read(path), path=path)
    assert verdict.reasons == []
    # That code was edited since is no fault of the entry: a re-run says whether it matters.
    assert not [one for one in verdict.unchecked if "was made by other code" not in one]


@pytest.mark.parametrize("path", OLDER, ids=[place(path) for path in OLDER])
def test_an_entry_of_older_rules_says_so(path: Path) -> None:
    with pytest.raises(folder.Older, match="it does not stand: run the defense again"):
        folder.read(path)


def test_no_two_contradict_each_other() -> None:
    shared.consistent(HERE)
