"""docs/your-testbed.md and the example beside it, executed as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import declared as made
import pytest
import torch
from conftest import Cli
from test_tutorial import blocks, commands, shows

from benchmark.testbeds.declared import Declared

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "your-testbed.md"
EXAMPLE = DOCS / "examples" / "vit-tiny"
#: Where a checkout may have real weights and data beside it; they are never part of it.
SHARED = Path(__file__).parents[2] / "shared"


def test_the_tutorial_works_as_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    made.checkpoint(tmp_path / "models" / "vit", "vit")
    made.imagefolder(tmp_path / "data" / "shapes", {"train": 200, "test": 40})
    made.parquet(tmp_path / "data" / "signs", {"train": 200, "test": 40})
    ran = []
    for kind, title, body in blocks(PAGE.read_text(encoding="utf-8")):
        if kind == "toml":
            Path(title).write_text(body, encoding="utf-8")
            continue
        assert kind == "console"
        for line, shown in commands(body):
            program, *arguments = shlex.split(line)
            assert program == "unmergebench"
            code, printed = cli(*arguments)
            assert code == 0, printed
            shows(printed, shown)
            ran.append(arguments[0])
    assert ran == ["show", "run", "run"]
    cells = Path("runs/mine/cells.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["status"] for line in cells} <= {"ok", "no-benefit"}


def test_links_of_the_page_point_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target


def test_the_example_on_the_real_model(tmp_path: Path, cli: Cli) -> None:
    if not (SHARED / "models" / "vit_tiny").is_dir():
        pytest.skip("no real model and data beside this checkout")
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    for kind, name, source in (
        ("models", "vit_tiny", "models/vit_tiny"),
        ("data", "mnist", "data/vision/mnist"),
        ("data", "notmnist", "data/vision/notmnist"),
    ):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name).symlink_to(SHARED / source)
    code, printed = cli("run", tmp_path / "suite.toml", "--dry-run", "--json")
    assert code == 0, printed
    assert json.loads(printed)["cells"]
    text = (tmp_path / "testbed.toml").read_text(encoding="utf-8")
    few = text.replace("[defaults]", "[defaults]\nmax_train = 600\nmax_test = 200")
    testbed = Declared(made.write(tmp_path, few))
    task = testbed.task("mnist")
    with torch.no_grad():
        logits = task.logits(testbed.features(testbed.base(), task.test.inputs))
    right = float((logits.argmax(1) == task.test.labels).float().mean())
    assert right > 0.5  # ten classes; 72.8 % with 2,000 rows for the probe
