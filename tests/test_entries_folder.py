"""Entries on disk: places, links, versions, history, many writers, other schemas."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli
from jsonschema import Draft202012Validator
from small_entries import commands, small, suite

import leaderboard
from benchmark.core.errors import UnmergeBenchError
from benchmark.pipeline import suite as suites
from leaderboard import checks, folder, history, load_entries
from leaderboard.entry import json_schema
from leaderboard.strict import Malformed
from leaderboard.submit import _write
from leaderboard.verify import verify


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of the small entry ships."""
    monkeypatch.setattr(suites, "builtin", lambda: ["tiny"])
    monkeypatch.setattr(suites, "load", lambda name: suite())


def older(path: Path) -> Path:
    """The entry at ``path`` as if it had been made under the scoring version before."""
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    return path


def test_the_small_entry_is_sound() -> None:
    assert checks.problems(small()) == []


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    made = small()
    path = folder.write(tmp_path, made)
    assert path == tmp_path / "mergelock" / "tiny-1.json"
    assert folder.read(path) == made
    assert [entry for _, entry in folder.everything(tmp_path)] == [made]
    Draft202012Validator(json_schema()).validate(json.loads(path.read_text()))
    bad = {**json.loads(path.read_text()), "more": 1}
    assert not Draft202012Validator(json_schema()).is_valid(bad)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    made = small(environment={"note": "two\nlines"})
    with pytest.raises(Malformed, match=r"U\+000A"):
        folder.write(tmp_path, made)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "spec",
    [
        "params", "params(scaling=symmetric)", "params-scaling-symmetric", "Params", "con", "nul.x",
        "../../etc/passwd", "/etc/passwd", "..", ".", "a/../b", "x" * 200, "x" * 199 + "y", "é",
        "-", "my file.py:C",
    ],
)  # fmt: skip
def test_slugs_are_safe_names(spec: str) -> None:
    name = folder.slug(spec)
    assert Path(name).name == name
    assert name.strip(".") == name
    assert len(name) <= 100
    assert name.split(".")[0] not in ("con", "nul")


def test_two_specs_never_share_a_place(tmp_path: Path) -> None:
    specs = [
        "params(a=b)",
        "params-a-b",
        "params(a=b )",
        "PARAMS(a=b)",
        "params--a-b",
        "params-a-b-",
    ]
    assert len({folder.slug(spec) for spec in specs}) == len(specs)
    for spec in specs:
        folder.write(tmp_path, small(spec))
    assert {e.defense.spec for _, e in folder.everything(tmp_path)} == set(specs)
    # Should two ever meet, nothing is overwritten.
    folder.write(tmp_path, small("params")).rename(tmp_path / "params-a-b" / "tiny-9.json")
    with pytest.raises(UnmergeBenchError, match="move it"):
        _write(tmp_path, small("params-a-b"))
    with pytest.raises(Malformed, match="move it"):
        list(folder.everything(tmp_path))


def test_links_folders_and_devices_are_refused(tmp_path: Path) -> None:
    path = folder.write(tmp_path / "real", small())
    place = tmp_path / "entries"
    (place / "mergelock").mkdir(parents=True)
    link = place / "mergelock" / "tiny-1.json"
    link.symlink_to(path)
    with pytest.raises(Malformed, match="no plain file"):
        list(folder.everything(place))
    link.unlink()
    link.mkdir()
    with pytest.raises(Malformed, match="no plain file"):
        list(folder.everything(place))
    link.rmdir()
    (place / "mergelock").rmdir()
    (place / "mergelock").symlink_to(path.parent)
    with pytest.raises(Malformed, match="is a link"):
        list(folder.everything(place))
    for device in ("/dev/zero", "/dev/null", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(Malformed, match="no plain file"):
            folder.read(Path(device))
    with pytest.raises(UnmergeBenchError, match="no folder of entries"):
        list(folder.everything(tmp_path / "none"))


def test_versions_supersede_each_other(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        entry, path = _write(tmp_path, small(credit=f"try {number}"))
        assert entry.version == f"tiny-{number}"
        assert verify(entry, path=path).sound
    marks = {e.version: e.superseded_by for _, e in folder.everything(tmp_path)}
    assert marks == {"tiny-1": "tiny-2", "tiny-2": "tiny-3", "tiny-3": ""}
    (tmp_path / "mergelock" / "tiny-2.json").unlink()
    assert _write(tmp_path, small()).entry.version == "tiny-4"
    first = tmp_path / "mergelock" / "tiny-1.json"
    assert "no later version" in verify(folder.read(first), path=first).reasons[0]
    elsewhere = first.rename(tmp_path / "tiny-1.json")
    assert "its place is mergelock/tiny-1.json" in verify(small(), path=elsewhere).reasons[0]
    frame = load_entries(tmp_path)
    assert frame["version"].tolist() == ["tiny-4"]
    assert len(load_entries(tmp_path, all_versions=True)) == 2
    assert frame.loc[0, "robust_weights"] == pytest.approx(0.8, abs=0.1)


def submitting(place: Path, who: int) -> None:
    """One of several processes."""
    for n in range(4):
        with folder.locked(place):
            _write(place, small(credit=f"{who}/{n}"))


@pytest.mark.slow
def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    """Three processes submit four versions each while this one reads."""
    (tmp_path / "mergelock").mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_entries", "leaderboard.submit"])
    writers = [context.Process(target=submitting, args=(tmp_path, who)) for who in range(3)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        list(folder.everything(tmp_path))  # raises on half a file
        reads += 1
    assert [writer.exitcode for writer in writers] == [0] * 3
    entries = [entry for _, entry in folder.everything(tmp_path)]
    assert sorted(e.number for e in entries) == list(range(1, 13))
    assert {e.credit for e in entries} == {f"{i}/{n}" for i in range(3) for n in range(4)}
    assert [e.version for e in entries if e.stands] == ["tiny-12"]
    assert reads


def test_an_entry_of_older_rules_stays_and_does_not_stand(tmp_path: Path, cli: Cli) -> None:
    old = older(folder.write(tmp_path, small()))
    with pytest.raises(folder.Older, match=r"made under scoring version 1.*run the defense"):
        folder.read(old)
    assert list(folder.everything(tmp_path)) == []
    assert load_entries(tmp_path, all_versions=True).empty
    commands()
    code, out = cli("verify", old)
    assert (code, "does not stand" in out) == (1, True)
    # What is submitted next takes the next number, and nothing is written into the old file.
    before = old.read_bytes()
    entry, path = _write(tmp_path, small())
    assert (entry.version, old.read_bytes()) == ("tiny-2", before)
    assert verify(entry, path=path).state == "sound"
    assert [found.version for _, found in folder.everything(tmp_path)] == ["tiny-2"]


@pytest.mark.parametrize("version", [0, -1, 3, True, "1", None, [1], 2.0])
def test_a_schema_that_this_code_does_not_know(version: object) -> None:
    data = {**small().model_dump(mode="json"), "schema_version": version}
    with pytest.raises(Malformed, match="this code reads 2") as refusal:
        folder.parse(json.dumps(data).encode(), "x")
    assert not isinstance(refusal.value, folder.Older)


# What a pull request may do


def rewritten(place: Path, **fields: object) -> list[str]:
    """Problems of changing the entry in ``place`` so, against the small entry as it was."""
    old = place.with_name("old")
    folder.write(old, small(credit="A"))
    folder.write(place, small(**{"credit": "A", **fields}))
    return history.compare(old, place).problems


def test_scores_change_with_a_new_version_only(tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert rewritten(new) == []
    assert rewritten(new, invalidated="a bug") == []
    assert history.compare(tmp_path / "old", new).touched == []
    (problem,) = rewritten(new, cells=small().cells[:1])
    assert problem.startswith("mergelock/tiny-1.json: cells changed")
    assert "credit changed" in rewritten(new, credit="B")[0]
    assert "no later version here" in rewritten(new, superseded_by="tiny-2")[0]
    folder.write(tmp_path / "old", small(credit="A", invalidated="a bug"))
    folder.write(new, small(credit="A"))
    assert "invalidated was taken back" in history.compare(tmp_path / "old", new).problems[0]


def test_old_entries_stay_as_they_are(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for place in (old, new):
        older(folder.write(place, small()))
    assert history.compare(old, new) == ([], [])
    _write(new, small())
    changes = history.compare(old, new)
    assert ([path.name for path in changes.touched], changes.problems) == (["tiny-2.json"], [])
    folder.write(new, small())  # the old file made over
    assert any("tiny-1.json" in problem for problem in history.compare(old, new).problems)
    older(new / "mergelock" / "tiny-2.json")
    problems = history.compare(tmp_path / "none", new).problems
    assert any("made under scoring version 1" in problem for problem in problems)


def test_versions_are_added_and_never_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for place in (old, new):
        for credit in ("A", "B"):
            _write(place, small(credit=credit))
    assert history.compare(old, new) == ([], [])
    assert len(history.compare(tmp_path / "none", new).touched) == 2
    _write(new, small(credit="C"))
    changes = history.compare(old, new)
    assert [path.name for path in changes.touched] == ["tiny-3.json"]
    assert not changes.problems
    (new / "mergelock" / "tiny-1.json").unlink()
    (problem,) = history.compare(old, new).problems
    assert problem == "mergelock/tiny-1.json was removed; mark it as invalidated instead"
    (old / "mergelock" / "tiny-1.json").unlink()
    folder.write(new, small())
    problems = history.compare(old, new).problems
    assert any("tiny-1 is not later than tiny-2" in p for p in problems)


def test_strangers_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"
    folder.write(new, small())
    (new / "setup.py").write_text("")
    (new / "mergelock" / "deep").mkdir()
    (new / "mergelock" / "README.md").symlink_to("/etc/passwd")
    (new / "mergelock" / "tiny-2.json").write_text("{")
    assert history.main([str(tmp_path / "old"), str(new)]) == 1
    found = capsys.readouterr()
    assert found.out.splitlines() == [str(new / "mergelock" / "tiny-1.json")]
    for reason in ("setup.py is neither", "deep is a folder", "README.md is a link", "no JSON"):
        assert reason in found.err


# Imports, schema


def test_the_package_imports_nothing_until_asked() -> None:
    code = (
        "import sys, leaderboard; sys.exit(str({'torch', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stderr.strip() == "set()"
    assert callable(leaderboard.load_entries)
    with pytest.raises(AttributeError, match="no attribute 'load_entrys'"):
        getattr(leaderboard, "load_entrys")  # noqa: B009


def test_the_schema_is_printed(cli: Cli) -> None:
    commands()
    code, out = cli("verify", "--schema")
    schema = json.loads(out)
    assert (code, schema["$id"]) == (0, "unmergebench-entry-2.json")
    Draft202012Validator.check_schema(schema)
