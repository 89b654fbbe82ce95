"""submit and verify from the command line, on run folders of made-up cells."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from forging import everywhere
from small_entries import commands, made, small, suite

from benchmark.api import methods
from benchmark.core.errors import UnmergeBenchError
from benchmark.core.paths import cache
from benchmark.pipeline import suite as suites
from leaderboard import folder, shared
from leaderboard import submit as submitting
from leaderboard.cli import build
from leaderboard.rerun import empty_store
from leaderboard.submit import Incomplete, submit
from leaderboard.verify import verify

SOURCE = methods.DEFENSES.fingerprint("mergelock")


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of the small entry ships."""
    monkeypatch.setattr(suites, "builtin", lambda: ["tiny"])
    monkeypatch.setattr(suites, "load", lambda name: suite())
    commands()


def run(home: Path, checks: object) -> Path:
    """A finished run of the small suite, with what it says of checks."""
    place = home / "run"
    place.mkdir()
    facts = {
        "suite": {"hash": suite().hash, **suite().model_dump(mode="json")},
        "testbed": {"name": "minilm", "hash": "5" * 64},
        "finished": True,
        "checks": checks,
    }
    (place / "run.json").write_text(json.dumps(facts))
    lines = [cell.model_dump_json() + "\n" for cell in small().cells]
    (place / "cells.jsonl").write_text("".join(lines))
    return place


def test_what_passed_its_checks_is_submitted(tmp_path: Path, cli: Cli) -> None:
    marks = {"mergelock": {"source": SOURCE, "passed": True, "failed": []}}
    place = run(tmp_path, marks)
    code, out = cli("submit", place, "--entries", tmp_path / "entries", "--json")
    assert code == 0, out
    path = Path(json.loads(out)[0]["path"])
    assert folder.read(path).defense.source_sha256 == SOURCE
    code, out = cli("verify", path, "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], verdict["reasons"]) == (0, "sound", [])
    said = " ".join(verdict["notes"])
    for note in ("no cell was run again", "nothing to compare with", "seconds"):
        assert note in said


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        (None, "was not held to `unmergebench check defense mergelock`; run it again"),
        ({}, "was not held to"),
        ({"params": {"source": SOURCE, "passed": True, "failed": []}}, "was not held to"),
        ({"mergelock": True}, "was not held to"),
        ({"mergelock": {"source": "0" * 64, "passed": True, "failed": []}}, "was edited since"),
        (
            {"mergelock": {"source": SOURCE, "passed": False, "failed": ["seeded", "exact"]}},
            "failed seeded, exact; mend it",
        ),
        ({"mergelock": {"source": SOURCE, "passed": "yes"}}, "failed a check"),
    ],
)
def test_what_did_not_pass_is_refused(tmp_path: Path, checks: object, reason: str) -> None:
    with pytest.raises(Incomplete) as refusal:
        submit(run(tmp_path, checks), tmp_path / "entries")
    assert reason in refusal.value.reasons[0]
    assert "\n" not in refusal.value.reasons[0]
    assert not list((tmp_path / "entries").rglob("*.json"))


def test_exit_codes(tmp_path: Path, cli: Cli) -> None:
    """0 sound, 1 unsound or not checked, 2 a wrong line."""
    sound = folder.write(tmp_path / "a", small())
    assert cli("verify", sound)[0] == 0
    data = json.loads(sound.read_text())
    data["cells"][0]["protection"] = 0.99
    sound.write_text(json.dumps(data))
    code, out = cli("verify", sound)
    assert (code, "not sound" in out) == (1, True)
    unknown = folder.write(tmp_path / "b", small("mine.py:Mine"))
    for rerun in ("0", "2", "all"):  # whatever is asked, nothing of it was run
        code, out = cli("verify", unknown, "--rerun", rerun)
        assert code == 1
        assert "mine.py:Mine tiny-1: not checked" in out
        assert "agrees" not in out
    for wrong in ("some", "-1", "1.5"):
        code, out = cli("verify", sound, "--rerun", wrong)
        assert (code, "a number of cells, or 'all'" in out) == (2, True)


def test_a_folder_that_contradicts_itself_is_not_built(tmp_path: Path) -> None:
    place = tmp_path / "entries"
    folder.write(place, small())
    honest = folder.write(place, small("params"))
    shared.consistent(place)
    data = made(suite("arf")).model_dump(mode="json")
    everywhere("expert", down=6)(data)
    folder.write(place, folder.Entry.model_validate(data))
    with pytest.raises(UnmergeBenchError, match="contradict each other: 6 of 20 outcomes of expe"):
        shared.consistent(place)
    with pytest.raises(UnmergeBenchError, match="mark it as invalidated"):
        build(place, tmp_path / "site")
    assert not (tmp_path / "site").exists()
    # With another folder to compare with, there is no contradiction.
    verdict = verify(folder.read(honest), path=honest, entries=tmp_path / "entries")
    assert verdict.state == "not-checked"
    (tmp_path / "empty").mkdir()
    assert verify(folder.read(honest), path=honest, entries=tmp_path / "empty").sound


def test_a_rerun_starts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's store holds; downloads alone are shared."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(tmp_path))
    for name in ("store", "testbeds", "assets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("made before")
    with empty_store() as scratch:
        assert cache() == scratch
        assert {path.name for path in scratch.iterdir()} == {"assets", "hub"}
        assert (scratch / "assets" / "old").read_text() == "made before"
    assert os.environ["UNMERGEBENCH_CACHE"] == str(tmp_path)
    assert not scratch.exists()
    assert (tmp_path / "assets" / "old").exists()


def test_a_rerun_uses_that_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leaderboard import rerun
    from leaderboard import verify as verifying

    entry = small()
    data = methods.testbed("minilm").method
    monkeypatch.setattr(type(data), "content_hash", lambda self: "5" * 64)
    mine, seen = cache(), []

    def again(suite: object, stated: Any, scratch: Path, notify: Callable[[str], None]) -> Any:
        seen.append((stated, cache()))
        return stated

    monkeypatch.setattr(verifying, "again", again)
    verdict = verify(entry, rerun="all")
    assert verdict.sound
    assert [cell for cell, _ in seen] == list(entry.cells)
    assert {where for _, where in seen} & {mine} == set()
    assert len({where for _, where in seen}) == 1
    assert rerun.choose(entry, 1, 3) == rerun.choose(entry, 1, 3)


@pytest.mark.parametrize("writes", [1, 2])
def test_a_submission_that_was_killed_is_finished_not_made_again(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first file, and after it has superseded the version before."""
    into = tmp_path / "entries"
    marks = {"mergelock": {"source": SOURCE, "passed": True, "failed": []}}
    place = run(tmp_path, marks)
    submit(place, into, credit="before")
    write, done = folder.write, []

    def killed(home: Path, entry: Any) -> Path:
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(entry)
        return write(home, entry)

    clock = itertools.count()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=next(clock))

    monkeypatch.setattr(submitting, "datetime", Later)
    monkeypatch.setattr(folder, "write", killed)
    if writes == 1:
        with pytest.raises(KeyboardInterrupt):
            submit(place, into)
    else:
        submit(place, into)
    monkeypatch.setattr(folder, "write", write)
    for _ in range(2):
        (made,) = submit(place, into)
        assert made.path.name == "tiny-2.json"
        first, second = (folder.read(into / "mergelock" / f"tiny-{n}.json") for n in (1, 2))
        assert first.superseded_by == "tiny-2"
        assert second.stands
        assert len(list(made.path.parent.glob("*.json"))) == 2
