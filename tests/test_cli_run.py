"""run and report as a user meets them: good lines, wrong lines, full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli
from fabricated import save, suite

from benchmark import cli as command
from benchmark.core.errors import UsageError
from benchmark.pipeline import run as running


def main(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and stderr of the real entry point."""
    monkeypatch.setattr(sys, "argv", ["unmergebench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command.main()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quik"], "unknown suite 'quik'; did you mean 'quick'?"),
        (["run", "gone.toml"], "no such suite file"),
        (["run", "--defense", "parms"], "unknown defense 'parms'; did you mean 'params'?"),
        (["run", "--attack", "aag"], "did you mean 'aga'?"),
        (["run", "--merger", "tise"], "did you mean 'ties'?"),
        (["run", "--defense", "params(scalling=none)"], "did you mean 'scaling'?"),
        (["run", "--defense", "params(scaling=diag)"], "'diagonal'"),
        (["run", "--defense", "params(low=-1)"], "need 0 < low < high"),
        (["run", "--merger", "ties(density=much)"], "density='much'"),
        (["run", "--defense", "gone.py:Mine"], "no such file: gone.py"),
        (["run", "--victim", "r9"], "no victim 'r9'"),
        (["run", "--device", "tpu9"], "unknown device"),
        (["run", "--seed", "x"], "integer"),
        (["show", "mergelok"], "did you mean 'mergelock'?"),
        (["explain", "utility"], "did you mean 'utility-gate'?"),
    ],
)
def test_a_wrong_line_is_one_error_with_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = main(arguments, monkeypatch, capsys)
    assert code == 2
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "nothing may be written"


def test_an_out_folder_below_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, error = main(["run", "smoke", "--out", tmp_path / "file/run"], monkeypatch, capsys)
    assert code == 1
    assert error.count("\n") == 1
    assert "choose another folder" in error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_line(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(running, "write_text", refuse)
    code, error = main(["run", "smoke", "--out", tmp_path / "run"], monkeypatch, capsys)
    assert code == 1
    assert error.count("\n") == 1
    assert ("free some space" in error) == (number == errno.ENOSPC)
    assert not (tmp_path / "run/cells.jsonl").exists()


def test_ctrl_c_says_that_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_execute", interrupted)
    code, error = main(["run", "smoke", "--out", tmp_path / "run"], monkeypatch, capsys)
    assert code == 130
    assert "resumes" in error


def test_the_plan_can_be_seen_without_running_it(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("run", "quick", "--defense", "params(scaling=symmetric)", "--out", out)
    code, text = cli(*arguments, "--dry-run", "--json")
    plan = json.loads(text)
    assert code == 0
    assert {cell["defense"] for cell in plan["cells"]} == {"params(scaling=symmetric)"}
    assert plan["suite"] == "quick-custom"
    assert not out.exists()


def test_report_recomputes_a_run(cli: Cli, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", suite())
    code, text = cli("report", folder, "--json")
    assert code == 0
    assert json.loads(text) == json.loads((folder / "leaderboard.json").read_text())
    assert (folder / "report.html").stat().st_size > 10_000
    code, text = cli("report", folder)
    assert code == 0
    assert "Ranking" in text


def test_report_of_what_is_no_run(cli: Cli, tmp_path: Path) -> None:
    code, text = cli("report", tmp_path)
    assert code == 1
    assert "holds no run" in text
    folder = save(tmp_path / "run", suite())
    (folder / "run.json").write_text("{")
    assert "damaged" in cli("report", folder)[1]


def test_an_interrupted_line_is_dropped_and_a_wrong_one_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", suite())
    whole = running.read_cells(folder)
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"key": "torn')
    assert running.read_cells(folder) == whole


def test_usage_errors_are_not_failures() -> None:
    assert UsageError("x").exit_code == 2


@pytest.mark.parametrize("line", ["show dropout-pruning", "show dropout-pruning --json"])
def test_a_terminal_of_another_encoding_is_no_failure(line: str) -> None:
    """After minutes of work a θ that cp1252 lacks must not end it in a traceback."""
    code = "from benchmark.cli import main; main()"
    out = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert b"Traceback" not in out.stderr
    if "--json" in line:
        text = json.dumps(json.loads(out.stdout), ensure_ascii=False)
        assert not text.isascii(), "nothing is lost in JSON"
