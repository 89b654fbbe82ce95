"""What each of the known ways to rank first without protecting gets now, by the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmark.core.errors import AssetError
from benchmark.core.records import Cell
from benchmark.evaluation import accuracy
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load
from benchmark.reporting.board import Row
from benchmark.reporting.ranking import rank

CHEATS = Path(__file__).with_name("cheats.py")
JUDGE = accuracy.relative_gap, accuracy.Evaluator.correct


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return home


def judged(folder: Path, *specs: str, **changes: object) -> tuple[dict[str, Row], list[Cell]]:
    """The ranking of these defenses, and their cells."""
    fields = {
        **load("smoke").model_dump(),
        "defenses": ("none", *specs),
        "attacks": ("none", "gauge-align"),
        "mergers": ("task-arithmetic",),
        "test": 200,
        "validation_rungs": (8, 32, 64),
        **changes,
    }
    plan = planning.make(Suite.model_validate(fields), torch.device("cpu"))
    cards = {p.at.defense.spec: p.at.defense.method.card for p in plan.cells}
    try:
        cells = running.execute(plan, folder, torch.device("cpu"))
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    board = rank(cells, cards.__getitem__)
    rows = {row.defense.rpartition(":")[2]: row for row in board.rows}
    return rows, [cell for cell in cells if cell.defense != "none"]


@pytest.mark.slow
def test_what_spoils_or_patches_reaches_nobody(tmp_path: Path) -> None:
    """In-place noise on the base, a patched evaluator: in a process of its own, for nothing."""
    rows, cells = judged(tmp_path, f"{CHEATS}:Spoils", f"{CHEATS}:Patches")
    assert (accuracy.relative_gap, accuracy.Evaluator.correct) == JUDGE
    for name in ("Spoils", "Patches"):
        assert rows[name].standing == "ranked"
        assert rows[name].robust["weights"].protection == 0
    assert {cell.logit_gap for cell in cells} == {0.0}
    undefended = rows["none"]
    assert all(rows[name].utility == undefended.utility for name in ("Spoils", "Patches"))


@pytest.mark.slow
def test_training_on_the_test_split_is_an_error(tmp_path: Path) -> None:
    rows, cells = judged(tmp_path, f"{CHEATS}:TrainsOnTest")
    assert {cell.status for cell in cells} == {"error"}
    assert "not given the test split" in cells[0].reason
    assert rows["TrainsOnTest"].standing == "unranked"


@pytest.mark.slow
def test_what_gives_the_benefit_away_protects_nothing(tmp_path: Path) -> None:
    """A release that knows the partner's task: once `no-benefit`, and left out of its own score."""
    from benchmark.api import methods
    from benchmark.core.state import add, task_vector
    from benchmark.pipeline.store import Store
    from benchmark.pipeline.workbench import Workbench

    bench = Workbench(methods.testbed("digits"), torch.device("cpu"), Store(tmp_path / "store"))
    group = load("smoke").groups[0]
    base = bench.base.state()
    both = base
    for task in (group.victim, *group.partners):
        both = add(both, task_vector(bench.expert(task).state(), base))
    save_file({k: v.contiguous() for k, v in both.items()}, tmp_path / "both.safetensors")
    rows, cells = judged(tmp_path / "run", f"{CHEATS}:GivesAway(path={tmp_path}/both.safetensors)")
    (row,) = (row for name, row in rows.items() if name.startswith("GivesAway"))
    assert {cell.status for cell in cells} == {"ok"}
    assert "outside-raised" in row.flags
    assert all(cell.protection == 0 for cell in cells)
    assert (row.standing, row.rank) == ("unranked", None)
    assert "a rank needs 50 %" in row.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NoOp", "Hidden", "WhenJudged", "Remembers"])
def test_other_modules_have_a_track_of_their_own_and_open_books(tmp_path: Path, name: str) -> None:
    rows, cells = judged(tmp_path, f"{CHEATS}:{name}", attacks=("none", "auto"))
    row = rows[name]
    assert row.track == "modules"
    assert "changes-modules" in row.flags
    asked = {cell.attack for cell in cells}
    assert {"read-shipped", "auto(tier=unlabeled)"} <= asked
    read, seen = (
        next(cell for cell in cells if cell.attack == attack)
        for attack in ("read-shipped", "auto(tier=unlabeled)")
    )
    if name == "NoOp":
        assert read.protection == 0
        assert read.sha256.recovered == read.sha256.expert
    elif name == "Remembers":
        # Its teacher shows attackers the base; that it does is what tells it apart.
        assert row.standing == "two-faced"
        assert "two-faced" in row.flags
    else:
        assert seen.protection < 0.5
        # What copies the answers, whatever the weights are.
        assert str(seen.ensemble["winner"]).split("+")[-1] in ("distil-merge", "trap-smooth")
