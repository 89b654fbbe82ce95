"""The commands of the README, run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import Cli
from disk import write
from fabricated import save, suite

from benchmark.api import methods
from benchmark.io import folders

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line of a shell block that calls the program alone."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("unmergebench ")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the README's lines speak of, in the current folder."""
    base = folders.load(write("bert", tmp_path / "base"))
    for seed, name in enumerate(("expert", "mine")):
        rng = torch.Generator().manual_seed(seed)
        moved = {
            k: v + 0.01 * torch.randn(v.shape, generator=rng) if v.is_floating_point() else v
            for k, v in base.state.items()
        }
        folders.save(moved, base, tmp_path / name)
    (tmp_path / "my-suite.toml").write_text(
        (ROOT / "benchmark/suites/quick.toml").read_text(encoding="utf-8")
    )
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs/quick", suite())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.slow
def test_every_command_of_the_readme_works(workplace: Path, cli: Cli) -> None:
    for line in commands():
        arguments = shlex.split(line)[1:]
        if arguments[0] == "run":  # whole runs are tests of their own
            arguments = [a for a in arguments if a != "cuda" and a != "--device"]
            arguments.append("--dry-run")
        code, text = cli(*arguments)
        assert code == 0, f"{line}: {text}"
    assert folders.load(workplace / "merged").state.keys()


def test_ci_runs_the_line_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 \"(.*)\" README", script)[1].replace("\\[", "[")
    line = pattern.removeprefix("^").replace("\\]", "]")
    assert any(row.startswith(line) for row in README.splitlines())
    assert re.search(r"^pip install -e '\.\[test\]' && pytest$", README, re.MULTILINE)
    assert re.search(r"^pip install -e \. && unmergebench run$", README, re.MULTILINE)


def test_the_table_of_defenses_says_what_their_cards_say() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*arXiv ([\d.]+), (\w+) \| (yes|no) \|$", README, re.M)
    assert len(rows) >= 5
    for name, arxiv, fidelity, exact in rows:
        card = methods.defense(name).method.card
        assert (card.arxiv, card.fidelity, card.exact) == (arxiv, fidelity, exact == "yes"), name


def test_links_point_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
