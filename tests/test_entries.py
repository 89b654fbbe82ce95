"""Entries of the leaderboard from a real run: submitted, verified, run again, tampered, marked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from forging import copied
from small_entries import commands

from benchmark.api import methods
from benchmark.core.errors import AssetError, UsageError
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline import suite as suites
from benchmark.pipeline.suite import Suite
from leaderboard import folder, load_entries
from leaderboard import verify as verifying
from leaderboard.challenge import best_known
from leaderboard.submit import Incomplete, submit
from leaderboard.verify import verify

CPU = torch.device("cpu")
TINY = Suite(
    name="tiny",
    description="for a test",
    testbed="digits",
    groups=({"victim": "mnist-low", "partners": ("digits-high",)},),
    defenses=("none", "mergelock"),
    attacks=("none", "finetune-recovery(per_class=2, steps=3)"),
    mergers=("task-arithmetic", "slerp"),
    test=100,
    validation_rungs=(16,),
    fixed_coefficients=(0.8,),
)


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the module, and a small suite that ships."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    shipped = {name: suites.load(name) for name in suites.builtin()} | {"tiny": TINY}
    monkeypatch.setattr(suites, "builtin", lambda: sorted(shipped))
    monkeypatch.setattr(suites, "load", shipped.__getitem__)
    return home


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        try:
            running.execute(planning.make(TINY, CPU), out, CPU)
        except AssetError as error:
            pytest.skip(f"the data of `digits` is not to be had here: {error}")
    source = methods.DEFENSES.fingerprint("mergelock")
    facts = json.loads((out / "run.json").read_text())
    facts["checks"] = {"mergelock": {"source": source, "passed": True, "failed": []}}
    (out / "run.json").write_text(json.dumps(facts))
    return out


@pytest.fixture
def warm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that are run again find the run's own store: one test of an empty one is enough."""

    @contextmanager
    def store() -> Iterator[Path]:
        yield home

    monkeypatch.setattr(verifying, "empty_store", store)


@pytest.fixture
def entry(run: Path, tmp_path: Path) -> Path:
    """The file of a fresh entry."""
    ((_, path),) = submit(run, tmp_path / "entries", credit="A. Author")
    return path


def edit(path: Path, change: Callable[[Any], Any], name: str = "") -> Path:
    data = json.loads(path.read_text())
    change(data)
    out = path.with_name(name) if name else path
    out.write_text(json.dumps(data))
    return out


def test_submit_then_verify_then_run_again(run: Path, tmp_path: Path, cli: Cli) -> None:
    """Run again from nothing: base, experts and release are trained anew."""
    commands()
    place = tmp_path / "entries"
    code, out = cli("submit", run, "--entries", place, "--json")
    assert code == 0, out
    (made,) = json.loads(out)
    assert (made["defense"], made["version"]) == ("mergelock", "tiny-1")
    assert Path(made["path"]) == place / "mergelock" / "tiny-1.json"
    assert "Fidelity" in (place / "mergelock" / "README.md").read_text()
    code, out = cli("verify", made["path"], "--rerun", "2", "--seed", "1", "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], len(verdict["rerun"])) == (0, "sound", 2), verdict
    assert all(cell["agrees"] and cell["same_release"] for cell in verdict["rerun"])
    edit(Path(made["path"]), lambda e: e["cells"][0].update(utility=1.0))
    code, out = cli("verify", made["path"])
    assert code == 1
    assert "utility does not follow" in out
    assert cli("submit", run, "--defense", "parms")[0] == 2
    assert cli("verify", tmp_path / "nothing.json")[0] == 1
    code, out = cli("submit", run, "--entries", place)
    assert code == 0
    assert "tiny-2" in out
    assert "git add" in out


def attacked(data: Any) -> Any:
    """The cell in which the release is fine-tuned and merged."""
    return next(c for c in data["cells"] if c["attack"] != "none" and c["gain"])


def test_what_a_run_makes_fits_what_is_checked(entry: Path) -> None:
    """Choices have the names that the checks go by, and the outcomes of what they name."""
    cells = folder.read(entry).cells
    for cell in cells:
        assert cell.choice in ("merge", "merge, refined", cell.outside_choice)
        assert cell.outside_choice.removesuffix(", refined") in (
            "released alone", "base", "digits-high alone", "partners", "control alone", "control",
        )  # fmt: skip
    alone = [c for c in cells if c.outside_choice == "released alone" and c.status != "skipped"]
    assert alone
    for cell in alone:
        assert cell.correct["outside"]["mnist-low"] == cell.correct["released"]["mnist-low"]
    assert any(cell.choice == cell.outside_choice for cell in alone)


@pytest.mark.usefixtures("warm")
def test_forged_outcomes_are_found_by_running_again(entry: Path) -> None:
    forged = folder.read(edit(entry, lambda e: copied("attacked", "outside")(attacked(e))))
    assert verify(forged).sound
    verdict = verify(forged, rerun="all")
    assert verdict.state == "unsound"
    assert any("outcomes of attacked on" in reason for reason in verdict.reasons), verdict.reasons
    assert sum(not cell["agrees"] for cell in verdict.rerun) == 1


@pytest.mark.usefixtures("warm")
def test_forged_benefits_are_found_by_running_again(entry: Path) -> None:
    """Figures that do not follow from outcomes: budget and gaps."""

    def cheaper(data: Any) -> None:
        attacked(data)["budget"]["examples"] += 1000
        attacked(data)["standalone"] = 0.1
        attacked(data)["recovered_gap"] = 1e6

    verdict = verify(folder.read(edit(entry, cheaper)), rerun="all")
    text = " ".join(verdict.reasons)
    for reason in ("examples, stated", "recovered model alone", "recovered_gap is"):
        assert reason in text


def test_a_changed_suite_is_another_suite(entry: Path) -> None:
    def easier(data: Any) -> None:
        data["suite"]["definition"]["attacks"] = ["none"]
        asked = Suite.model_validate(data["suite"]["definition"])
        data["suite"]["hash"] = asked.hash

    (reason,) = verify(folder.read(edit(entry, easier))).reasons
    assert "suite tiny was changed" in reason


# What submit refuses


def changed(run: Path, tmp_path: Path, facts: Callable[[Any], Any], cells: Any = None) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    found = json.loads((run / "run.json").read_text())
    facts(found)
    (copy / "run.json").write_text(json.dumps(found))
    lines = [json.loads(line) for line in (run / "cells.jsonl").read_text().splitlines()]
    kept = cells(lines) if cells else lines
    (copy / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in kept))
    return copy


def error(cells: list[Any]) -> list[Any]:
    cells[-1] |= {"status": "error", "reason": "MethodError: NaN", "correct": {}, "gain": None}
    return cells


@pytest.mark.parametrize(
    ("facts", "cells", "reason"),
    [
        (lambda f: f.update(finished=False), None, "the run is not finished"),
        (lambda f: f["suite"].update(test=50), None, "it changed the suite tiny: test"),
        (lambda f: f["suite"].update(name="mine"), None, "does not ship with UnmergeBench"),
        (lambda f: f.pop("suite"), None, "lacks suite or testbed"),
        (lambda f: None, lambda c: c[:-2], "cell missing: mnist-low + digits-high, seed 0, finet"),
        (lambda f: None, error, "error: MethodError: NaN"),
        (lambda f: None, lambda c: [x for x in c if x["defense"] == "none"], "only controls"),
    ],
)
def test_runs_that_cannot_be_submitted(
    run: Path, tmp_path: Path, facts: Any, cells: Any, reason: str
) -> None:
    with pytest.raises(Incomplete) as refusal:
        submit(changed(run, tmp_path, facts, cells), tmp_path / "entries")
    assert reason in str(refusal.value)
    assert not list((tmp_path / "entries").rglob("*.json"))


def test_all_that_is_missing_is_listed(run: Path, tmp_path: Path) -> None:
    short = changed(run, tmp_path, lambda f: None, lambda c: c[:-3])
    with pytest.raises(Incomplete) as refusal:
        submit(short, tmp_path / "entries")
    assert str(refusal.value).count("cell missing") == len(refusal.value.reasons) == 3


# Strangers' code


def test_nothing_an_entry_or_run_names_is_imported(
    run: Path, entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "canary.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\n")
    monkeypatch.chdir(tmp_path)
    spec = "canary.py:C"
    for field in ("attack", "merger"):
        bad = edit(entry, lambda e, field=field: e["cells"][0].update({field: spec}), "tiny-7.json")
        assert not verify(folder.read(bad), rerun=1).sound
        bad.unlink()

    def own(data: Any) -> None:
        data["defense"]["spec"] = spec
        data["suite"]["definition"]["defenses"] = [spec]
        data["suite"]["hash"] = Suite.model_validate(data["suite"]["definition"]).hash
        for cell in data["cells"]:
            cell["defense"] = spec

    hostile = folder.read(edit(entry, own))
    place = tmp_path / "hostile"
    folder.write(place, hostile)
    assert load_entries(place)["defense"].tolist() == [spec]
    verdict = verify(hostile, rerun=1)
    assert verdict.state == "not-checked"
    assert any("neither looked at nor run" in one for one in verdict.unchecked)
    copy = changed(run, tmp_path, lambda f: None, lambda c: [{**x, "defense": spec} for x in c])
    with pytest.raises(UsageError, match="does not ship"):
        submit(copy, place)
    assert not marker.exists()
    with pytest.raises(UsageError, match="not a Defense"):  # the canary can sing
        submit(copy, place, defenses=[spec])
    assert marker.exists()


# Challenges


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("warm")
def test_a_stronger_attack_is_recorded_with_credit(entry: Path, tmp_path: Path, cli: Cli) -> None:
    commands()
    before = best_known(folder.read(entry))
    good = recipe(tmp_path, 'attack = "gauge-align"\ncredit = "B. Breaker"\n')
    arguments = ("challenge", entry, "--recipe", good, "--out", tmp_path / "replay", "--json")
    code, out = cli(*arguments)
    assert code == 0, out
    marked = folder.read(entry)
    assert [c.credit for c in marked.certificates] == ["B. Breaker"]
    assert marked.certificates[0].same_release
    assert best_known(marked)["weights"] < before["weights"] - 0.5
    verdict = verify(marked, path=entry, rerun="all")
    assert verdict.sound, verdict
    assert len(verdict.rerun) == 6
    code, out = cli(*arguments)
    assert code == 1
    assert "Nothing was recorded" in out
    twice = marked.model_copy(update={"certificates": marked.certificates * 2})
    assert verify(twice).reasons == [
        "certificate 2: gauge-align is no stronger than what was known"
    ]
    edit(entry, lambda e: e["certificates"][0].update(attack="none"))
    assert any("certificate 1" in reason for reason in verify(folder.read(entry)).reasons)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attack = ", "not valid TOML"),
        ('attack = "none"\n', "credit: Field required"),
        ('attack = "none"\ncredit = "x"\nmerger = "ties"\n', "did you mean 'mergers'"),
        ('attack = "gauge-alin"\ncredit = "x"\n', "does not ship"),
        ('attack = "canary.py:C"\ncredit = "x"\n', "does not ship"),
        ('attack = "gauge-align(strength=1)"\ncredit = "x"\n', "no parameter"),
    ],
)
def test_bad_recipes(entry: Path, tmp_path: Path, cli: Cli, text: str, reason: str) -> None:
    commands()
    code, out = cli("challenge", entry, "--recipe", recipe(tmp_path, text))
    assert code == 2
    assert reason in out
    assert "\n" not in out.strip() or "TOML" in out
