"""The entries of this repository: all that a reader can hold them to without running anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from leaderboard import folder
from leaderboard.paths import ENTRIES
from leaderboard.verify import verify

HERE = Path(__file__).parent.parent / ENTRIES
PATHS = sorted(HERE.glob("*/*.json"))
PUBLISHED = (
    "params", "params-d", "mergelock", "mergebarrier-attn", "mergebarrier-taylor", "trap2",
    "mergeguard", "arf", "arf+mergelock",
)  # fmt: skip


@pytest.mark.parametrize("suite", ["quick", "smoke"])
def test_the_published_defenses_have_entries(suite: str) -> None:
    found = {
        entry.defense.spec.split("(")[0]
        for _, entry in folder.everything(HERE)
        if entry.suite.name == suite
    }
    assert found >= set(PUBLISHED)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_entry_is_sound(path: Path) -> None:
    assert verify(folder.read(path), path=path).reasons == []


def test_a_reader_is_told_that_the_source_is_another_one() -> None:
    entry = folder.read(PATHS[0])
    other = entry.defense.model_copy(update={"source_sha256": "0" * 64})
    found = verify(entry.model_copy(update={"defense": other}))
    assert any("was edited since" in note for note in found.notes)
    assert found.reasons == []
