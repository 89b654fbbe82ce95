"""Which defenses passed `check`, as a run writes it down: once for each source, and in the open."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from benchmark.conformance import marks as marking
from benchmark.conformance.marks import NO_REPORT, marks
from benchmark.core.errors import UsageError

FILE = """
from dataclasses import dataclass
from benchmark.api import Card, Defense

print("{")
print("a line of its own")

@dataclass(frozen=True)
class Mine(Defense):
    card = Card("ships the base, and says nothing of it")
    expected_failed_checks = {"bfloat16": "never tried"}

    def protect(self, victim, rng):
        next(iter(victim.base.values())).data.add_(1)
        return {k: v.float() for k, v in victim.expert.items()}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    return "mine.py:Mine"


class Checks:
    """Stands in for the process that checks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **outcomes: str) -> None:
        self.specs: list[str] = []
        self.outcomes = outcomes
        self.stdout: str | None = None
        monkeypatch.setattr(marking.subprocess, "run", self)

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.specs.append(command[5])
        failed = "failed" in self.outcomes.values()
        checks = [{"check": name, "status": status} for name, status in self.outcomes.items()]
        printed = json.dumps({"passed": not failed, "checks": checks}, indent=2)
        stdout = printed if self.stdout is None else self.stdout
        return subprocess.CompletedProcess(command, int(failed), stdout, "noise\nthe last line\n")


@pytest.mark.slow
def test_a_foreign_defense_is_checked_in_a_process_of_its_own(mine: str) -> None:
    heard: list[str] = []
    found = marks([mine, mine, "none"], heard.append)
    assert found[mine]["failed"] == ["inputs-unchanged"]
    assert found[mine]["excused"] == ["bfloat16"]
    assert not found[mine]["passed"]
    assert found["none"]["passed"]
    assert found[mine]["source"] != found["none"]["source"]
    assert heard == ["checking mine.py:Mine against its contract"]


def test_what_ships_is_held_by_our_own_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(monkeypatch)
    found = marks(["params", "params+mergelock", "mergelock+params", "params(perm=random)"])
    assert all(mark["passed"] and not mark["failed"] for mark in found.values())
    assert found["params"]["source"] == found["params(perm=random)"]["source"]
    assert found["params+mergelock"]["source"] != found["mergelock+params"]["source"]
    assert not checks.specs


def test_part_of_somebody_else_makes_all_of_it_theirs(
    mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch, card="passed")
    assert marks([f"params+{mine}"])[f"params+{mine}"]["passed"]
    assert checks.specs == [f"params+{mine}"]


def test_once_for_each_source_and_setting(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(monkeypatch, seeded="failed", card="passed")
    first = marks([mine])
    assert marks([mine]) == first
    assert len(checks.specs) == 1
    Path("mine.py").write_text(FILE + "\n# edited\n")
    assert marks([mine])[mine]["source"] != first[mine]["source"]
    marks([f"{mine}+params"])
    assert len(checks.specs) == 3


def test_a_remembered_mark_that_is_damaged_is_made_again(
    mine: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch, card="passed")
    marks([mine])
    (kept,) = (cache / "checks").iterdir()
    kept.write_text("{")
    assert marks([mine])[mine]["passed"]
    assert len(checks.specs) == 2


@pytest.mark.parametrize("printed", ["", "{", "[]", "no JSON"])
def test_no_report_is_no_pass_and_is_not_remembered(
    printed: str, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, heard = Checks(monkeypatch, card="passed"), []
    checks.stdout = printed
    assert marks([mine], heard.append)[mine] == {
        **marks([mine])[mine], "passed": False, "failed": [NO_REPORT],
    }  # fmt: skip
    assert heard[-1] == "no report on mine.py:Mine: the last line"
    assert len(checks.specs) == 2


def test_one_that_never_ends_fails(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(marking.subprocess, "run", run)
    heard: list[str] = []
    assert marks([mine], heard.append)[mine]["failed"] == [NO_REPORT]
    assert heard[-1].endswith(f"it has not ended in {marking.LIMIT} s")


def test_a_run_writes_the_marks_and_says_what_failed(
    mine: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It goes on all the same."""
    Checks(monkeypatch, seeded="failed", finite="failed")
    given: dict[str, Any] = {}

    def execute(*arguments: Any, facts: dict[str, Any], **options: Any) -> None:
        given.update(facts)
        raise UsageError("far enough")

    monkeypatch.setattr("benchmark.pipeline.run.execute", execute)
    code, text = cli("run", "smoke", "--defense", mine, "--defense", "none")
    assert (code, text) == (2, "far enough")
    assert {spec: mark["passed"] for spec, mark in given["checks"].items()} == {
        mine: False,
        "none": True,
    }
    assert given["checks"][mine]["failed"] == ["seeded", "finite"]
