"""Entries of the leaderboard from a real run: submitted, verified, run again, tampered, marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli

from benchmark.core.errors import AssetError, UnmergeBenchError, UsageError
from benchmark.evaluation.scoring import accuracies, gain, normalized, protection
from benchmark.evaluation.statistics import ratio_protection, unpack_bits
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline import suite as suites
from benchmark.pipeline.suite import Suite
from leaderboard import folder, load_entries
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
    return out


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
    from leaderboard.commands import register

    _registered(register)
    place = tmp_path / "entries"
    code, out = cli("submit", run, "--entries", place, "--json")
    (made,) = json.loads(out)
    assert (code, made["defense"], made["version"]) == (0, "mergelock", "tiny-1")
    assert Path(made["path"]) == place / "mergelock" / "tiny-1.json"
    assert "Fidelity" in (place / "mergelock" / "README.md").read_text()
    code, out = cli("verify", made["path"], "--rerun", "2", "--seed", "1", "--json")
    verdict = json.loads(out)
    assert (code, verdict["sound"], len(verdict["rerun"])) == (0, True, 2)
    assert all(cell["agrees"] and cell["same_release"] for cell in verdict["rerun"])
    edit(Path(made["path"]), lambda e: e["cells"][0].update(utility=1.0))
    code, out = cli("verify", made["path"])
    assert code == 1
    assert "utility_drop does not follow" in out
    assert cli("submit", run, "--defense", "parms")[0] == 2
    assert cli("verify", tmp_path / "nothing.json")[0] == 1
    code, out = cli("submit", run, "--entries", place)
    assert code == 0
    assert "tiny-2" in out
    assert "git add" in out


def _registered(register: Callable[[Any], None]) -> None:
    """The commands as the entry point adds them, once."""
    from benchmark.cli import app

    if not any(c.callback and c.callback.__name__ == "verify" for c in app.registered_commands):
        register(app)


def recompute(cell: dict[str, Any]) -> None:
    """All that follows from outcomes that were edited."""
    bits = {w: {t: unpack_bits(x) for t, x in o.items()} for w, o in cell["correct"].items()}
    gains = {w: gain(bits[w], bits["expert"]) for w in ("attacked", "undefended", "outside")}
    cell |= {
        "accuracy": accuracies(bits["attacked"]),
        "normalized": normalized(accuracies(bits["attacked"]), accuracies(bits["expert"])),
        "gain": gains["attacked"],
        "protection": protection(*gains.values()),
        "protection_ci": ratio_protection(cell["correct"], scope="digits").interval,
    }
    if cell["merged_accuracy"]:
        cell["merged_accuracy"] = cell["accuracy"]


def worse(cell: dict[str, Any]) -> None:
    """As if the free-rider had got nothing: consistent in itself."""
    cell["correct"]["attacked"] = dict(cell["correct"]["outside"])
    recompute(cell)


def attacked(data: Any) -> Any:
    """The cell in which the release is fine-tuned and merged."""
    return next(c for c in data["cells"] if c["attack"] != "none" and c["gain"])


def empty(cell: dict[str, Any], status: str, reason: str) -> None:
    """The cell as if it had not been measured."""
    where = ("key", "testbed", "victim", "partners", "seed", "defense", "attack", "merger")
    kept = {name: cell[name] for name in (*where, "access", "task_id")}
    cell.clear()
    cell.update(kept, status=status, reason=reason)


TAMPERED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an accuracy": (
        lambda e: attacked(e)["accuracy"].update({"mnist-low": 0.11}),
        "accuracy does not follow",
    ),
    "a protection": (lambda e: attacked(e).update(protection=0.99), "protection does not follow"),
    "an interval": (lambda e: attacked(e).update(protection_ci=[0.9, 1.0]), "interval does not"),
    "a cell dropped": (lambda e: e["cells"].pop(), "cell missing: mnist-low + digits-high"),
    "a cell twice": (lambda e: e["cells"].append(e["cells"][0]), "1 cells stand twice"),
    "another cell": (
        lambda e: e["cells"].append({**e["cells"][0], "seed": 9}),
        "cell the suite does not ask for",
    ),
    "a hash swapped": (
        lambda e: attacked(e)["sha256"].update(released="a" * 64),
        "its released is not the one the entry names",
    ),
    "a hash of the subjects": (
        lambda e: e["subjects"].update(base="b" * 64),
        "its base is not the one",
    ),
    "a tier": (lambda e: attacked(e).update(access="weights"), "claims access weights"),
    "a track": (lambda e: attacked(e).update(task_id=True), "another track"),
    "a failure": (
        lambda e: empty(e["cells"][0], "error", "no luck"),
        "failed: no luck",
    ),
    "an attack skipped": (
        lambda e: empty(attacked(e), "skipped", "not today"),
        "status skipped, but",
    ),
    "flags": (lambda e: e.update(flags=["norm-blow-up"]), "states flags norm-blow-up"),
    "a cell's flag": (
        lambda e: attacked(e).update(flags=["utility-gate"]),
        "flag utility-gate does not follow",
    ),
    "the expert in one cell": (
        lambda e: attacked(e)["correct"].update(expert=attacked(e)["correct"]["outside"]),
        "outcomes of the expert for mnist-low differ between cells",
    ),
    "examples at no cost": (
        lambda e: e["cells"][0]["budget"].update(examples=3),
        "spent examples, which its access does not grant",
    ),
    "negative seconds": (
        lambda e: e["cells"][0]["seconds"].update(protect=-1.0),
        "protect is negative",
    ),
    "a share of no count": (
        lambda e: e["cells"][0]["zero_shot"].update({"mnist-low": 0.12345}),
        "is no share",
    ),
    "fixed coefficients": (lambda e: e["cells"][0].update(fixed={}), "other coefficients"),
    "the card": (
        lambda e: e["defense"]["card"].update(summary="Perfect."),
        "its card is not that of the defense installed here",
    ),
    "a later version": (
        lambda e: e.update(superseded_by="tiny-9"),
        "superseded by tiny-9, which is no later version here",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_found(entry: Path, what: str) -> None:
    change, reason = TAMPERED[what]
    verdict = verify(folder.read(edit(entry, change)), path=entry)
    assert not verdict.sound
    assert any(reason in found for found in verdict.reasons), verdict.reasons


def test_a_skipped_cell_holds_no_figures(entry: Path) -> None:
    """Else its utility would count, though nothing in it is checked."""
    edit(entry, lambda e: empty(e["cells"][0], "skipped", "x") or e["cells"][0].update(utility=1.0))
    with pytest.raises(UnmergeBenchError, match="a cell with status skipped holds figures"):
        folder.read(entry)


def test_a_changed_suite_is_another_suite(entry: Path) -> None:
    def easier(data: Any) -> None:
        data["suite"]["definition"]["attacks"] = ["none"]
        asked = Suite.model_validate(data["suite"]["definition"])
        data["suite"]["hash"] = asked.hash

    (reason,) = verify(folder.read(edit(entry, easier))).reasons
    assert "suite tiny was changed" in reason
    edit(entry, lambda e: e["suite"]["definition"].update(test=50))
    with pytest.raises(UnmergeBenchError, match="hash is not that of its definition"):
        folder.read(entry)


def test_forged_outcomes_are_found_by_running_again(entry: Path) -> None:
    forged = folder.read(edit(entry, lambda e: worse(attacked(e))))
    assert verify(forged).sound
    verdict = verify(forged, rerun=4)
    assert not verdict.sound
    assert any("run again" in reason and "accuracy of attacked" in reason
               for reason in verdict.reasons), verdict.reasons  # fmt: skip


def test_forged_benefits_are_found_by_running_again(entry: Path) -> None:
    """Figures that do not follow from outcomes: utility, budget and gaps."""

    def cheaper(data: Any) -> None:
        attacked(data)["budget"]["examples"] += 1000
        attacked(data)["standalone"] = 0.1
        attacked(data)["recovered_gap"] = 1e6

    verdict = verify(folder.read(edit(entry, cheaper)), rerun=4, seed=0)
    text = " ".join(verdict.reasons)
    for reason in ("examples, stated", "recovered model alone", "recovered_gap is"):
        assert reason in text


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
    assert any("not here, or not trusted" in reason for reason in verdict.reasons)
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


def test_a_stronger_attack_is_recorded_with_credit(entry: Path, tmp_path: Path, cli: Cli) -> None:
    from leaderboard.commands import register

    _registered(register)
    before = best_known(folder.read(entry))
    good = recipe(tmp_path, 'attack = "gauge-align"\ncredit = "B. Breaker"\n')
    arguments = ("challenge", entry, "--recipe", good, "--out", tmp_path / "replay", "--json")
    code, out = cli(*arguments)
    assert code == 0, out
    marked = folder.read(entry)
    assert [c.credit for c in marked.certificates] == ["B. Breaker"]
    assert marked.certificates[0].same_release
    assert best_known(marked)["weights"] < before["weights"] - 0.5
    assert verify(marked, path=entry, rerun=6).sound
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
    from leaderboard.commands import register

    _registered(register)
    code, out = cli("challenge", entry, "--recipe", recipe(tmp_path, text))
    assert code == 2
    assert reason in out
    assert "\n" not in out.strip() or "TOML" in out
