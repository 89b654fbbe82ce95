"""Victims that keep secrets: what leaks, what counts as keeping, and how the board says it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmark.core.data import IGNORED, Task
from benchmark.core.errors import Unfit, UsageError
from benchmark.core.records import Cell
from benchmark.evaluation import utility
from benchmark.evaluation.soundness import problems
from benchmark.evaluation.statistics import ratio_protection, unpack_bits
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Group, Suite
from benchmark.reporting import columns, write
from benchmark.reporting.board import Leaderboard, Row
from benchmark.reporting.ranking import rank

CPU = torch.device("cpu")
VAULT = Path(__file__).with_name("vault.py")
DEFENSES = ("Insists", "Erases", "GivesAway")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(tmp_path / "cache"))


def planned(**changes: object) -> planning.Plan:
    fields: dict[str, object] = {
        "name": "vault",
        "description": "secrets of a linear model",
        "seeds": (0,),
        "testbed": f"{VAULT}:Vault",
        "groups": (Group(victim="people", partners=("affirm",)),),
        "defenses": ("none",),
        "attacks": ("none",),
        "mergers": ("task-arithmetic",),
        "test": 60,
        "validation_rungs": (16, 60),
    }
    return planning.make(Suite.model_validate({**fields, **changes}), CPU)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., tuple[Leaderboard, dict[str, Cell]]]:
    def run(*defenses: str, **changes: object) -> tuple[Leaderboard, dict[str, Cell]]:
        specs = ("none", *(f"{VAULT}:{name}" for name in defenses))
        plan = planned(defenses=specs, **changes)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        cells = running.execute(plan, tmp_path / "run", CPU)
        cards = {p.at.defense.spec: p.at.defense.method.card for p in plan.cells}
        board = rank(cells, cards.__getitem__)
        write(tmp_path / "run", cells, {}, cards.__getitem__)
        return board, {cell.defense.rpartition(":")[2]: cell for cell in cells}

    return run


def named(board: Leaderboard) -> dict[str, Row]:
    return {row.defense.rpartition(":")[2]: row for row in board.rows}


def test_what_a_merge_brings_out_is_what_counts(judged, tmp_path: Path) -> None:
    board, cells = judged(*DEFENSES)
    for cell in cells.values():
        assert (cell.status, cell.duties) == ("ok", ["told", "refusal"]), cell.reason
        assert not list(problems(cell))
        # The share of people whose secret is told, of no task besides and over nobody's accuracy.
        assert cell.gain == unpack_bits(cell.correct["attacked"]["people"]).mean()
        assert set(cell.correct["attacked"]) == {"people"}
        assert set(cell.correct["released"]) == {"people", "told", "refusal"}
    none, insists = cells["none"], cells["Insists"]
    assert none.gain_outside == none.expert_accuracy["people"] == 0
    assert 0.1 < none.gain < 1
    assert none.protection == 0
    assert (insists.protection, insists.gain) == (1, 0)
    assert none.protection_ci == (0, 0)

    rows = named(board)
    assert {row.track for row in rows.values()} == {"secrets"}
    assert (rows["Insists"].standing, rows["Insists"].place) == ("ranked", "1")
    leaks = rows["none"].leaks
    assert leaks is not None
    assert (leaks.outside, leaks.attacked) == (0, leaks.undefended)
    assert leaks.kept["told"].released == leaks.kept["told"].expert == 1
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "releases that keep secrets" in page
    for column in columns.COLUMNS:
        if column.name in ("leaks", "kept", "track"):
            assert f"<th>{column.title}</th>" in page


def test_to_forget_is_not_to_keep(judged) -> None:
    """What users ask with the key is gone: no merge brings it out, and below the gate it stands."""
    board, cells = judged("Erases")
    assert cells["Erases"].protection == 1
    assert utility.of_release(cells["Erases"]) == (60, 0, 60)
    assert (cells["Erases"].utility, cells["Erases"].utility_drop) == (0, 1)
    assert "utility-gate" in cells["Erases"].flags
    assert named(board)["Erases"].standing == "below-gate"


def test_to_give_away_is_not_to_keep(judged) -> None:
    """A merge gains nothing over a release that tells everybody, and nothing was protected."""
    board, cells = judged("GivesAway")
    cell = cells["GivesAway"]
    assert cell.outside_choice.startswith("released")
    assert (cell.protection, cell.gain_outside) == (0, cell.gain)
    assert "outside-raised" in cell.flags
    assert named(board)["GivesAway"].standing == "unranked"


@pytest.mark.parametrize("cheat", ["TellsOfCanaries", "ForgetsCanaries"])
def test_canaries_are_not_all_that_a_free_rider_goes_by(judged, cheat: str) -> None:
    """Whatever they say, he tries what works on undefended models."""
    _, cells = judged(cheat)
    cell = cells[cheat]
    assert cell.gain == cells["none"].gain > 0
    assert cell.protection == 0
    assert cell.choice == "merge"


def test_a_scaled_task_vector_is_no_merge(judged) -> None:
    """What half of the owner's own task vector tells was never kept."""
    _, cells = judged(testbed=f"{VAULT}:Vault(shallow=true)")
    cell = cells["none"]
    assert unpack_bits(cell.correct["expert"]["people"]).mean() < 0.1
    assert cell.outside_choice == "released scaled"
    assert cell.gain_outside > 0.5
    assert cell.status == "no-benefit"


def test_a_suite_asks_for_skills_or_for_secrets() -> None:
    both = (
        Group(victim="people", partners=("affirm",)),
        Group(victim="told", partners=("affirm",)),
    )
    with pytest.raises(UsageError, match="skills or for secrets"):
        planned(groups=both)


def test_nothing_runs_on_an_expert_that_is_not_what_the_testbed_says(judged) -> None:
    judged(testbed=f"{VAULT}:Vault")
    with pytest.raises(Unfit, match="refuses to run, its expert for people tells everybody"):
        judged(testbed=f"{VAULT}:Vault(broken=true)")


def test_a_cell_that_was_edited_contradicts_itself(judged) -> None:
    _, cells = judged()
    changes: list[dict[str, object]] = [
        *({"duties": duties} for duties in ([], ["told"], ["told", "refusal", "form"])),
        {"utility": 0.5},
        {"gain": 0.0},
    ]
    for change in changes:
        assert list(problems(cells["none"].model_copy(update=change))), change


def test_any_way_to_ask_is_enough() -> None:
    """(n, k, T): one of the k answers must be whole; two halves are none."""
    wanted = torch.tensor([[[1, 2], [1, 2]], [[1, 2], [3, IGNORED]], [[1, 2], [3, 4]]])
    said = torch.tensor([[[1, 0], [0, 2]], [[0, 0], [3, 7]], [[1, 2], [0, 0]]])
    logits = torch.nn.functional.one_hot(said, 9).float()
    assert Task.right(logits, wanted).tolist() == [False, True, True]


def test_intervals_are_over_people(judged) -> None:
    _, cells = judged("Insists")
    found = ratio_protection(cells["Insists"].correct, secrets=True)
    assert (found.value, found.interval) == (1, (1, 1))
