"""Folders that are replaced: at every moment the old or the new one is there, and nobody's files
go with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cli
from disk import contents, write

from benchmark.core import outputs
from benchmark.core.errors import UsageError
from benchmark.core.outputs import MARKER, check_ours, recover, replacing_folder

HERE = Path(__file__).parent


def fill(out: Path, text: str) -> None:
    with replacing_folder(out) as made:
        for name in ("a", "b/c"):
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(text)


def state(out: Path) -> str:
    """The text of a whole folder; what is mixed or torn fails here."""
    found = contents(out)
    assert found.keys() == {"a", "b/c"}
    (text,) = {value.decode() for value in found.values()}
    return text


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(outputs, "_exchange", lambda one, two: False)
    return str(request.param)


def test_a_folder_is_replaced_whole(swap: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two", "three"):
        fill(out, text)
        assert state(out) == text
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no exchange of folders")
def test_this_system_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not outputs._exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "one" / "two").exists()
    assert (tmp_path / "two" / "one").exists()


def test_what_fails_leaves_all_as_it_was(swap: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")

    def interrupted() -> None:
        with replacing_folder(out) as made:
            (made / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_two_renames_is_mended(tmp_path: Path) -> None:
    """Where folders cannot be exchanged: the next run goes on from what is there."""
    for finished, expected in ((True, "new"), (False, "old")):
        out = tmp_path / f"out{finished}"
        fill(out, "new")
        sibling = tmp_path / f".{out.name}.new-killed"
        sibling.mkdir()
        (sibling / outputs._MAKING).mkdir()
        out.rename(sibling / (outputs._WHOLE if finished else outputs._MAKING + "x"))
        fill(tmp_path / "old", "old")
        (tmp_path / "old").rename(sibling / outputs._OLD)
        recover(out)
        assert state(out) == expected
        assert not sibling.exists()


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replacing_folder(out) as made:
        (made / "a").write_text("mine")
        recover(out)
        fill(out, "another's")
        assert (made / "a").exists()
        assert state(out) == "another's"
    assert contents(out) == {"a": b"mine"}


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "b/mine", "link"])
def test_files_that_nobody_made_here_are_never_removed(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    check_ours(out)
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).write_text("precious")
    with pytest.raises(UsageError, match="not made here; move it"):
        check_ours(out)


@pytest.mark.parametrize("marker", ["", "7", "[1]", "{", '"x"'])
def test_a_damaged_list_of_what_was_made_protects_everything(marker: str, tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / MARKER).write_text(marker)
    with pytest.raises(UsageError, match="not made here"):
        check_ours(tmp_path / "out")


def test_force_keeps_what_is_not_a_checkpoints(tmp_path: Path, cli: Cli) -> None:
    base = write("bert", tmp_path / "base")
    out = tmp_path / "out"
    arguments = ("protect", base, "--base", base, "--defense", "params", "--out", out, "--force")
    assert cli(*arguments)[0] == 0
    assert cli(*arguments)[0] == 0
    for name in ("notes.txt", ".git/HEAD", "results/table.csv"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        before = contents(out)
        code, text = cli(*arguments)
        assert code == 2
        assert f"also holds {name}" in text
        assert contents(out) == before
        (out / name).unlink()
    # A checkpoint of somebody else's making: its own parts may be replaced, and no more.
    theirs = write("bert", tmp_path / "theirs")
    arguments = (*arguments[:-2], theirs, "--force")
    (theirs / "README.md").write_text("precious")
    assert cli(*arguments)[0] == 2
    (theirs / "README.md").unlink()
    assert cli(*arguments)[0] == 0


_WRITER = """
import sys
from pathlib import Path
from benchmark.core import outputs
if sys.argv[2] == "renames":
    outputs._exchange = lambda one, two: False
number = 0
while True:
    number += 1
    with outputs.replacing_folder(Path(sys.argv[1])) as made:
        for name in ("a", "b/c"):
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(str(number))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_random_kills_lose_nothing(how: str, tmp_path: Path) -> None:
    """25 kills -9 each at a random moment of a writer that replaces a folder without end."""
    rng, out = random.Random(how), tmp_path / "out"
    fill(out, "0")
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, out, how], cwd=HERE.parent, env=os.environ
        )
        last = (out / MARKER).stat().st_mtime_ns
        while out.exists() and (out / MARKER).stat().st_mtime_ns == last:  # until it has begun
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        recover(out)
        assert int(state(out)) >= 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
