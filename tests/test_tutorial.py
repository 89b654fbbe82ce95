"""docs/your-defense.md, executed as written, in an empty folder."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import SkipTest

import pytest
from conftest import Cli

from benchmark.api.methods import DEFENSES

PAGE = Path(__file__).parents[1] / "docs" / "your-defense.md"
BLOCK = re.compile(r"^```(?P<kind>\w+) ?(?P<title>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(kind, title, body) of every fenced block, in order."""
    return [(m["kind"], m["title"], m["body"]) for m in BLOCK.finditer(text)]


def shows(output: str, expected: str) -> None:
    """Every expected line is in the output, in order; ``...`` stands for anything."""
    rows = [" ".join(row.split()) for row in output.splitlines()]
    for line in filter(None, expected.splitlines()):
        wanted = " ".join(line.split())
        if wanted == "...":
            continue
        pattern = re.compile(re.escape(wanted).replace(re.escape("..."), ".*"))
        found = next((i for i, row in enumerate(rows) if pattern.fullmatch(row)), None)
        assert found is not None, f"the page shows {line!r}; the program printed:\n{output}"
        rows = rows[found + 1 :]


def commands(body: str) -> list[tuple[str, str]]:
    """(command, what the page shows below it) of a console block."""
    first, *parts = re.split(r"^\$ ", body, flags=re.M)
    assert not first, "a console block begins with a command"
    return [(line, shown) for line, _, shown in (part.partition("\n") for part in parts)]


class Reader:
    """Somebody who follows the page."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self.code = 0
        self.printed = ""
        self.ran: list[str] = []

    def follow(self, kind: str, title: str, body: str) -> None:
        if kind == "console":
            for line, shown in commands(body):
                self.type(line, shown)
        elif kind == "text":
            shows(self.printed, body)
        elif not title:
            with redirect_stdout(StringIO()) as printed:
                exec(compile(body, str(PAGE), "exec"), {})
            self.printed = printed.getvalue()
        elif title.endswith(": replace"):
            path = Path(title.removesuffix(": replace"))
            old, new = body.split("---\n")
            assert path.read_text(encoding="utf-8").count(old) == 1
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        else:
            Path(title).write_text(body, encoding="utf-8")

    def type(self, line: str, shown: str) -> None:
        if line == "echo $?":
            shows(str(self.code), shown)
            return
        program, *arguments = shlex.split(line)
        assert program == "unmergebench"
        # A new process reads the file anew.
        DEFENSES._loaded.clear()
        self.code, output = self.cli(*arguments)
        self.ran.append(arguments[0])
        assert shown, f"the page shows nothing of {line}"
        shows(output, shown)


@pytest.mark.slow
def test_the_tutorial_works_as_written(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    monkeypatch.chdir(tmp_path)
    reader = Reader(cli)
    for kind, title, body in blocks(PAGE.read_text(encoding="utf-8")):
        reader.follow(kind, title, body)
    assert {"check", "run", "report"} <= set(reader.ran)
    assert reader.code == 0

    rows = {
        r["defense"] for r in json.loads(Path("runs/mine/leaderboard.json").read_text())["rows"]
    }
    assert rows == {"my_defense.py:MyDefense", "none", "params"}
    assert "MyDefense" in Path("runs/mine/report.html").read_text(encoding="utf-8")
    its_own_test_passes(Path("test_my_defense.py"))


def its_own_test_passes(path: Path) -> None:
    """What pytest would do with the page's test file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (mark,) = module.test_contract.pytestmark
    cases = list(mark.args[1])
    assert len(cases) > 15
    for name, check in cases:
        try:
            module.test_contract(name, check)
        except SkipTest:
            assert name == "device"


def test_a_page_that_drifts_fails() -> None:
    shows("a  b\nc 12 d\n", "a b\n...\nc ... d\n")
    with pytest.raises(AssertionError, match="the page shows 'gone'"):
        shows("a\nb\n", "gone\n")
    with pytest.raises(AssertionError):
        shows("a\nb\n", "b\na\n")


def test_links_of_the_page_point_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
