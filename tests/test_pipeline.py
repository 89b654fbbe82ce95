"""Whole runs on the testbed `digits`: resumable, reproducible, and honest about failures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import with_assets

from benchmark.core.errors import AssetError, UnmergeBenchError, UsageError
from benchmark.core.records import Cell
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load

CPU = torch.device("cpu")

BROKEN = '''
"""Defenses that break their contract, each in its own way."""
from dataclasses import dataclass
import torch
from benchmark.api.contracts import Card, Defense

@dataclass(frozen=True)
class Raises(Defense):
    card = Card("raises")
    def protect(self, victim, rng):
        raise RuntimeError("no luck\\nat all")

@dataclass(frozen=True)
class NaN(Defense):
    card = Card("NaN")
    def protect(self, victim, rng):
        key = victim.anatomy.mlp[0].up.weight.key
        return {**victim.expert, key: victim.expert[key] * float("nan")}

@dataclass(frozen=True)
class Short(Defense):
    card = Card("loses a tensor")
    def protect(self, victim, rng):
        state = dict(victim.expert)
        state.pop(victim.anatomy.mlp[0].up.weight.key)
        return state

@dataclass(frozen=True)
class Huge(Defense):
    card = Card("finite weights, infinite logits")
    def protect(self, victim, rng):
        return {k: v * 1e30 if v.is_floating_point() else v for k, v in victim.expert.items()}
'''


@pytest.fixture(scope="module")
def suite() -> Suite:
    """A small part of `smoke`."""
    return Suite.model_validate(
        {
            **load("smoke").model_dump(),
            "defenses": ("none", "params", "mergelock", "noise"),
            "attacks": ("none", "gauge-align", "dropout-pruning", "finetune-recovery"),
            "mergers": ("task-arithmetic",),
            "test": 200,
        }
    )


def run(suite: Suite, folder: Path) -> list[Cell]:
    try:
        return running.execute(planning.make(suite, CPU), folder, CPU)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")


def timeless(folder: Path) -> list[dict]:
    """The cells of a run without what may differ between two equal runs: times."""
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    for cell in cells:
        cell.pop("seconds")
    return cells


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the whole module: experts are trained once."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return home


@pytest.fixture(scope="module")
def finished(suite: Suite, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        run(suite, folder)
    return folder


def cell(folder: Path, defense: str, attack: str) -> Cell:
    return next(c for c in running.read_cells(folder) if (c.defense, c.attack) == (defense, attack))


@pytest.mark.parametrize("lock", ["params", "mergelock"])
def test_a_lock_protects_until_it_is_aligned(finished: Path, lock: str) -> None:
    unattacked, aligned = cell(finished, lock, "none"), cell(finished, lock, "gauge-align")
    assert unattacked.status == aligned.status == "ok"
    # In two layers, pinning the victim at 1 and adding a little of the partner gets past the milder
    # scaling of PaRaMS; it does not get past a general lock.
    assert unattacked.protection >= {"params": 0.1, "mergelock": 0.9}[lock]
    assert unattacked.logit_gap <= 1e-4
    assert aligned.protection <= 0.1
    assert aligned.standalone == unattacked.utility


def test_the_undefended_expert_has_no_protection(finished: Path) -> None:
    undefended = cell(finished, "none", "none")
    assert undefended.protection == 0
    assert undefended.utility_drop == 0
    assert undefended.gain_undefended - undefended.gain_outside >= 0.02
    assert undefended.choice == "merge"


def test_splits_are_disjoint_in_what_is_reported(finished: Path, suite: Suite) -> None:
    found = cell(finished, "none", "none")
    assert found.n_test == suite.test
    assert found.n_val == suite.validation_rungs[-1]
    assert set(found.accuracy) == {found.victim, *found.partners}


def test_a_finished_run_is_not_touched(finished: Path, suite: Suite) -> None:
    before = (finished / "cells.jsonl").stat()
    start = time.process_time()
    run(suite, finished)
    assert time.process_time() - start < 5
    assert (finished / "cells.jsonl").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.slow
def test_two_runs_with_the_same_seeds_are_identical(
    finished: Path, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    fresh = with_assets(tmp_path / "cache", home / "testbeds")
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(fresh))
    run(suite, tmp_path / "run")
    assert timeless(tmp_path / "run") == timeless(finished)


def test_seeds_change_the_lock_only(suite: Suite, home: Path, tmp_path: Path) -> None:
    small = suite.model_copy(update={"seeds": (0, 1), "attacks": ("none",)})
    run(small, tmp_path / "run")
    cells = {(c.defense, c.seed): c for c in running.read_cells(tmp_path / "run")}
    assert cells["params", 0].sha256.released != cells["params", 1].sha256.released
    assert cells["none", 0].accuracy == cells["none", 1].accuracy


@pytest.mark.slow
def test_killed_in_the_middle_a_run_resumes_to_the_same_cells(
    finished: Path, suite: Suite, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = suite.model_copy(update={"defenses": suite.defenses[:2], "attacks": suite.attacks[:3]})
    expected = [
        c
        for c in timeless(finished)
        if c["defense"] in part.defenses and c["attack"] in part.attacks
    ]
    file = tmp_path / "suite.toml"
    file.write_text(_toml(part))
    fresh = with_assets(tmp_path / "cache", home / "testbeds")
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(fresh))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "benchmark.cli", "run", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    cells = out / "cells.jsonl"
    while process.poll() is None:
        if cells.exists() and len(cells.read_text().splitlines()) >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(cells.read_text().splitlines()) < len(expected) == 6
    with cells.open("a") as torn:  # a line cut short, as a crash leaves it
        torn.write('{"key": "half')
    run(load(str(file)), out)
    assert timeless(out) == expected


def _toml(suite: Suite) -> str:
    lines = []
    for key, value in suite.model_dump(mode="json").items():
        if key == "groups":
            groups = [
                f"{{ victim = {json.dumps(g['victim'])}, partners = {json.dumps(g['partners'])} }}"
                for g in value
            ]
            lines.append(f"groups = [{', '.join(groups)}]")
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Raises", "RuntimeError: no luck"),
        pytest.param("NaN", "holds NaN or infinity", marks=pytest.mark.slow),
        pytest.param("Short", "lacks tensor", marks=pytest.mark.slow),
        pytest.param("Huge", "NaN or infin", marks=pytest.mark.slow),
    ],
)
def test_a_defense_that_fails_is_an_error_and_never_protection(
    suite: Suite, home: Path, tmp_path: Path, name: str, reason: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    changed = suite.model_copy(update={"defenses": (f"{file}:{name}",), "attacks": ("none",)})
    (found,) = run(changed, tmp_path / "run")
    assert found.status == "error"
    assert reason in found.reason
    assert "\n" not in found.reason
    assert found.protection is None


def test_a_merger_that_does_not_apply_is_skipped(suite: Suite, home: Path, tmp_path: Path) -> None:
    tasks = planning.methods.testbed("digits").method.tasks
    victim, *partners = tasks[:3]
    changed = suite.model_dump() | {
        "groups": [{"victim": victim, "partners": partners}],
        "mergers": ("slerp",), "defenses": ("none",), "attacks": ("none",),
    }  # fmt: skip
    (found,) = run(Suite.model_validate(changed), tmp_path / "run")
    assert found.status == "skipped"
    assert "exactly two" in found.reason


def test_a_folder_that_holds_something_else_is_refused(
    finished: Path, suite: Suite, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(suite, tmp_path)
    other = suite.model_copy(update={"seeds": (7,)})
    with pytest.raises(UsageError, match="another suite"):
        run(other, finished)
    with pytest.raises(UsageError, match="is a file"):
        run(suite, tmp_path / "notes.txt")


def test_two_processes_do_not_write_one_run(finished: Path, suite: Suite, home: Path) -> None:
    from filelock import FileLock

    with FileLock(finished / ".lock"), pytest.raises(UnmergeBenchError, match="another process"):
        run(suite, finished)


def test_more_validation_than_there_is_is_refused(suite: Suite, home: Path, tmp_path: Path) -> None:
    greedy = suite.model_copy(update={"validation_rungs": (8, 10_000_000)})
    with pytest.raises(UsageError, match="validation examples"):
        run(greedy, tmp_path / "run")


def test_damaged_cells_are_named(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "cells.jsonl").read_text().splitlines()
    (tmp_path / "cells.jsonl").write_text(lines[0] + "\n{broken}\n" + lines[1] + "\n")
    with pytest.raises(UnmergeBenchError, match=r"cells\.jsonl:2"):
        running.read_cells(tmp_path)


def test_a_run_of_an_earlier_version_is_told(finished: Path, tmp_path: Path) -> None:
    cells = [json.loads(line) for line in (finished / "cells.jsonl").read_text().splitlines()]
    old = [{**cell, "gain_reference": None} for cell in cells]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in old))
    assert len(running.read_cells(tmp_path)) == len(cells)
    with pytest.raises(UnmergeBenchError, match="made by an earlier version"):
        running.judged_cells(tmp_path)
