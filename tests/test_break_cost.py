"""Protection against what the attacker uses: curves, plot, table, break cost. Cells are made up."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path

import pytest
import torch
from fabricated import NO_BENEFIT, RUN, cards, cell

from benchmark import reporting
from benchmark.core.errors import AssetError
from benchmark.core.records import Cell, Seconds, Spent
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load
from benchmark.reporting import plots, tables
from benchmark.reporting.board import Leaderboard
from benchmark.reporting.costs import break_curves
from benchmark.reporting.ranking import rank
from benchmark.reporting.summary import verdict

CPU = torch.device("cpu")


def tuned(
    defense: str, per_class: int, protection: float, prefix: str = "", **more: object
) -> Cell:
    """A cell of fine-tune recovery on so many examples per class (10 classes, 3 MFLOPs each)."""
    spent = Spent(examples=10 * per_class, per_class=per_class, steps=5, flops=3e7 * per_class)
    fields: dict[str, object] = {"access": "labeled", "budget": spent, **more}
    name = f"{prefix}finetune-recovery(per_class={per_class})"
    return cell(defense, name, protection=protection, **fields)  # type: ignore[arg-type]


def lock() -> list[Cell]:
    return [
        cell("lock", "none", protection=0.95),
        cell("lock", "aga", protection=0.8),
        tuned("lock", 1, 0.75),
        tuned("lock", 1, 0.7, "gauge-align+"),
        tuned("lock", 4, 0.4),
        tuned("lock", 16, 0.2),
    ]


def trap() -> list[Cell]:
    return [
        cell("trap", "none", protection=1.0),
        cell("trap", "aga", protection=0.9),
        tuned("trap", 1, 0.9),
        tuned("trap", 1, 0.9, "gauge-align+"),
        tuned("trap", 4, 0.85),
        tuned("trap", 16, 0.6),
    ]


def board() -> Leaderboard:
    return rank([*lock(), *trap()], cards)


# -- numbers ------------------------------------------------------------------------------------


def test_a_point_is_the_best_attack_with_so_many_examples() -> None:
    curves = {curve.defense: curve for curve in break_curves(board(), "per_class")}
    points = curves["lock"].points
    assert list(points) == [0, 1, 4, 16]
    assert [e.protection for e in points.values()] == pytest.approx([0.8, 0.7, 0.4, 0.2], abs=0.02)
    assert (points[0].attack, points[1].attack) == (
        "aga",
        "gauge-align+finetune-recovery(per_class=1)",
    )
    assert points[0].access == "weights"
    by_flops = {curve.defense: curve for curve in break_curves(board(), "flops")}["lock"].points
    assert list(by_flops) == [0, 3e7, 1.2e8, 4.8e8]


def test_unlabeled_data_stands_on_the_axis_of_compute_only() -> None:
    seen = cell("lock", "layer-refit", protection=0.3, access="unlabeled",
                budget=Spent(examples=64, flops=5e6))  # fmt: skip
    made = rank([*lock(), seen], cards)
    (examples,), (flops,) = break_curves(made, "per_class"), break_curves(made, "flops")
    assert list(examples.points) == [0, 1, 4, 16]
    assert examples.points[0].attack == "aga"
    assert flops.points[5e6].attack == "layer-refit"


def test_an_error_is_shown_and_no_point_is_drawn() -> None:
    broken = tuned("lock", 4, 0.0, "gauge-align+", status="error", reason="MethodError: no")
    (curve,) = break_curves(rank([*lock(), broken], cards), "per_class")
    assert curve.points[4].status == "error"
    assert list(curve.known()) == [0, 1, 16]
    nothing = [tuned("lock", n, 0.0, **NO_BENEFIT) for n in (4, 16)]
    (curve,) = break_curves(rank([*lock()[:4], *nothing], cards), "per_class")
    assert [e.status for e in curve.points.values()] == ["ok", "ok", "no-benefit", "no-benefit"]


def test_task_aware_mergers_and_plain_runs_make_no_curve() -> None:
    cells = [cell("lock", "none"), tuned("lock", 4, 0.1, task_id=True)]
    assert break_curves(rank(cells, cards), "per_class") == []


def test_break_cost_is_access_then_examples_then_compute() -> None:
    found = next(row for row in board().rows if row.defense == "lock")
    assert found.broken_by is not None
    assert (found.broken_by.per_class, found.broken_by.examples) == (4, 40)
    assert "40 examples (4 per class), 1.2e+08 FLOPs" in verdict(found)
    assert next(row for row in board().rows if row.defense == "trap").broken_by is None
    cheap = tuned("lock", 4, 0.45, "x+", budget=Spent(examples=40, per_class=4, flops=1e6),
                  seconds=Seconds(recover=99.0))  # fmt: skip
    made = rank([*lock(), cheap], cards).rows[0].broken_by
    assert made is not None
    assert made.attack.startswith("x+")


def test_cost_is_a_multiple_of_fine_tuning_where_it_took_longest() -> None:
    cells = [
        cell("trap", seed=0, seconds=Seconds(protect=9.0, expert=6.0)),
        cell("trap", seed=1, seconds=Seconds(protect=3.0, expert=1.0)),
    ]
    (row,) = rank(cells, cards).rows
    assert (row.protect_seconds, row.protect_multiple) == (9.0, 1.5)
    (row,) = rank([cell("trap")], cards).rows
    assert row.protect_multiple is None


def test_the_tax_is_the_worst_loss_against_the_expert() -> None:
    uses = {"bf16": {"released": 0.94, "expert": 0.94}, "int8": {"released": 0.8, "expert": 0.9}}
    better = {"bf16": {"released": 0.96, "expert": 0.94}, "int8": {"released": 0.9, "expert": 0.9}}
    cells = [cell("trap", seed=0, benign=uses), cell("trap", seed=1, benign=better)]
    (row,) = rank(cells, cards).rows
    assert row.tax == ("int8", pytest.approx(5.0))
    assert row.benign["bf16"].lost == pytest.approx(-1.0)
    (row,) = rank([cell("trap")], cards).rows
    assert row.tax is None


# -- plot, page, console ------------------------------------------------------------------------


def test_the_plot_shows_the_points_with_intervals(tmp_path: Path) -> None:
    made = board()
    drawn = plots.write(tmp_path, [*lock(), *trap()], made)
    assert tmp_path / "break_cost.png" in drawn.values()
    figure = plots.break_cost(break_curves(made, "per_class"), break_curves(made, "flops"))
    for axes, last in zip(figure.axes, (16, 4.8e8), strict=True):
        assert axes.get_xscale() == "symlog"
        containers = axes.containers
        assert [c.get_label() for c in containers] == [row.defense for row in made.rows]
        colours = {c.lines[0].get_color() for c in containers}
        assert len(colours) == 2
        line = containers[[row.defense for row in made.rows].index("lock")].lines
        assert list(line[0].get_ydata()) == pytest.approx([0.8, 0.7, 0.4, 0.2], abs=0.02)
        x = line[0].get_xdata()
        assert math.isclose(x[-1], last, rel_tol=0.2)
        (bars,) = line[2]
        assert all(segment[1][1] > segment[0][1] for segment in bars.get_segments())
        low, high = axes.get_xlim()
        assert low < min(x)
        assert high > max(x)


def test_one_number_of_examples_is_no_curve(tmp_path: Path) -> None:
    cells = [cell("lock", "none", protection=0.9), tuned("lock", 8, 0.1)]
    plots.write(tmp_path, cells, rank(cells, cards))
    assert not (tmp_path / "break_cost.png").exists()


def test_the_page_and_the_console_hold_them(tmp_path: Path) -> None:
    uses = {"int8": {"released": 0.8, "expert": 0.9}}
    note = {"benign.lora.release": "left out: <b>why</b>"}
    cells = [*lock(), *trap()]
    cells[0] = cell("lock", "none", protection=0.95, benign=uses, notes=note,
                    seconds=Seconds(protect=12.0, expert=8.0))  # fmt: skip
    reporting.write(tmp_path, cells, RUN, cards)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What breaking a defense costs" in page
    assert "<th>labelled examples per class</th><th>weights only</th><th>1</th><th>4</th>" in page
    assert "1.5 × tuning" in page
    assert "10.0</bdi><small><bdi>int8</bdi></small>" in page
    assert "80.0<small>of 90.0</small>" in page
    assert "left out: &lt;b&gt;why&lt;/b&gt;" in page
    from rich.console import Console

    console = Console(width=80, record=True, file=StringIO())
    tables.show(cells, rank(cells, cards), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("10.0", "int8", "12", "1.5 × tuning"):
        assert words in text


# -- what a run records -------------------------------------------------------------------------


def test_the_shipped_suite_covers_the_curve() -> None:
    plan = planning.make(load("breakcost"), CPU)
    counts = {
        sum(getattr(part, "per_class", 0) for part in getattr(a, "parts", (a,)))
        for a in (planned.at.attack.method for planned in plan.cells)
    }
    assert counts == {0, 1, 2, 4, 8, 16, 64}
    assert load("breakcost").benign


def test_parts_before_and_after_the_merge_are_charged_together(home: Path, tmp_path: Path) -> None:
    both = "rinse(per_class=2, steps=2)+finetune-recovery(per_class=3, steps=3)"
    suite = {
        **load("smoke").model_dump(),
        "defenses": ("none",),
        "attacks": ("gauge-align", "finetune-recovery(per_class=3, steps=3)", both),
        "mergers": ("average",),
        "test": 50,
        "validation_rungs": (16,),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        try:
            cells = running.execute(
                planning.make(Suite.model_validate(suite), CPU), tmp_path / "run", CPU
            )
        except AssetError as error:
            pytest.skip(f"the data of `digits` is not to be had here: {error}")
    none, one, two = (found.budget for found in cells)
    assert (none.examples, none.per_class, none.flops) == (0, 0, 0.0)
    assert (one.examples, one.per_class, one.steps) == (3 * 10, 3, 3)
    # Rinsing draws from the victim's five classes, fine-tuning from those of both tasks.
    assert (two.examples, two.per_class, two.steps) == (2 * 5 + 3 * 10, 5, 5)
    assert two.flops > one.flops > 0
