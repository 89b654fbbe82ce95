"""Runs put together, as a data frame and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fabricated import cards, cell, save, suite
from typer.testing import CliRunner

from benchmark.core.errors import UnmergeBenchError, UsageError
from leaderboard import combine, load_runs
from leaderboard.cli import app
from leaderboard.runs import COLUMNS


def show(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_row_per_defense_of_each_run(tmp_path: Path) -> None:
    one = save(tmp_path / "one", suite(("ties",)))
    two = save(tmp_path / "two", [cell("params", protection=0.25)])
    frame = load_runs([one, str(two)], cards)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == ["run", "suite", *COLUMNS]
    assert frame["run"].value_counts().to_dict() == {str(one): 7, str(two): 1}
    first, last = frame.iloc[0], frame.iloc[-1]
    assert (first["defense"], first["rank"], first["standing"]) == ("trap", 1, "ranked")
    assert first["attack_labeled"] == "finetune-recovery"
    assert first["low_labeled"] < first["robust_labeled"] < first["high_labeled"]
    assert last["robust_weights"] == pytest.approx(0.25, abs=0.02)
    assert last["break_attack"] == "none"
    locked = frame.set_index("defense").loc["mergelock"]
    assert locked["standing"] == "unranked"
    assert pd.isna(locked["rank"])


def test_runs_of_one_suite_are_ranked_together(tmp_path: Path) -> None:
    cells = suite()
    one = save(tmp_path / "one", [c for c in cells if c.merger == "ties"])
    two = save(tmp_path / "two", [c for c in cells if c.merger != "ties"])
    together = json.loads(show(one, two, "--json"))
    whole = json.loads(show(save(tmp_path / "all", cells), "--json"))
    assert {row["defense"]: row["rank"] for row in together["rows"]} == {
        row["defense"]: row["rank"] for row in whole["rows"]
    }
    assert {entry["merger"] for entry in together["matrix"]} == {"ties", "task-arithmetic"}
    text = show(one, two)
    assert "Ranking by robust protection" in text
    assert "Merged by ties" in text


def test_a_cell_counts_once_and_one_that_worked_wins(tmp_path: Path) -> None:
    failed = cell("params", status="error", reason="out of memory")
    worked, later = cell("params", protection=0.5), cell("params", protection=0.9)
    one = save(tmp_path / "one", [failed])
    two = save(tmp_path / "two", [worked])
    three = save(tmp_path / "three", [later])
    assert combine([one, two, three]) == [worked]
    assert combine([three, two, one]) == [later]


def test_different_suites_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [cell()])
    two = save(tmp_path / "two", [cell()], suite={"name": "made-up", "hash": "1" * 64})
    with pytest.raises(UsageError, match="ran different suites"):
        combine([one, two])
    with pytest.raises(UsageError, match="no run given"):
        combine([])


def test_damaged_and_missing_runs_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UnmergeBenchError, match="holds no run"):
        load_runs([tmp_path / "nowhere"], cards)
    bare = save(tmp_path / "bare", [cell()], suite={})
    with pytest.raises(UnmergeBenchError, match="names no suite hash"):
        combine([bare])
    damaged = save(tmp_path / "damaged", [cell()])
    (damaged / "cells.jsonl").write_text('{"key": 1}\n', encoding="utf-8")
    with pytest.raises(UnmergeBenchError, match=r"cells\.jsonl:1"):
        combine([damaged])


def test_help_has_examples() -> None:
    text = CliRunner().invoke(app, ["show", "--help"], env={"COLUMNS": "100"}).stdout
    assert "unmergebench leaderboard show runs/quick" in text
