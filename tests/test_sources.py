"""What a file or module depends on: everything it imports that has no version of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmark.core.errors import UsageError
from benchmark.core.sources import closure, fingerprint

CASES = {
    "a helper beside the file": ("import helper", {"helper.py": ""}, {"./helper.py"}),
    "from a helper": ("from helper import thing", {"helper.py": ""}, {"./helper.py"}),
    "a relative import": ("from . import helper", {"helper.py": ""}, {"./helper.py"}),
    "from a relative module": ("from .helper import thing", {"helper.py": ""}, {"./helper.py"}),
    "import a.b": (
        "import pack.inner",
        {"pack/__init__.py": "", "pack/inner.py": "", "pack/other.py": ""},
        {"./pack/__init__.py", "./pack/inner.py"},
    ),
    "a submodule from its package": (
        "from pack import inner, something",
        {"pack/__init__.py": "", "pack/inner.py": ""},
        {"./pack/__init__.py", "./pack/inner.py"},
    ),
    "everything of a package": (
        "from pack import *",
        {"pack/__init__.py": "__all__ = ['inner']", "pack/inner.py": ""},
        {"./pack/__init__.py", "./pack/inner.py"},
    ),
    "what the package imports": (
        "import pack",
        {"pack/__init__.py": "from .inner import x", "pack/inner.py": "from .. import helper",
         "helper.py": ""},
        {"./pack/__init__.py", "./pack/inner.py", "./helper.py"},
    ),
    "a folder without __init__": (
        "from pack.deep import inner",
        {"pack/deep/inner.py": ""},
        {"./pack/deep/inner.py"},
    ),
    "inside a function": (
        "def f():\n    if f:\n        import helper",
        {"helper.py": ""},
        {"./helper.py"},
    ),
    "by a name in quotes": (
        "import importlib\nimportlib.import_module('pack.inner')\n__import__('helper')",
        {"pack/inner.py": "", "helper.py": ""},
        {"./pack/inner.py", "./helper.py"},
    ),
    "a circle": (
        "import helper",
        {"helper.py": "import mine\nimport second", "second.py": "import helper"},
        {"./helper.py", "./second.py"},
    ),
    "a package before a module": (
        "import pack",
        {"pack/__init__.py": "", "pack.py": ""},
        {"./pack/__init__.py"},
    ),
    "what does not parse": ("import helper", {"helper.py": "import ("}, {"./helper.py"}),
    "nothing installed": ("import torch, json, numpy.linalg", {"unused.py": ""}, set()),
}  # fmt: skip


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("source", "files", "found"), CASES.values(), ids=CASES)
def test_the_closure_of_a_file(
    tmp_path: Path, source: str, files: dict[str, str], found: set[str]
) -> None:
    file = written(tmp_path, {**files, "mine.py": source}) / "mine.py"
    assert closure(file).keys() == {"./mine.py", *found}
    assert closure(file)["./mine.py"] == source.encode()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's package on the path, as if it were installed."""
    files = {
        "theirs_for_sources/__init__.py": "",
        "theirs_for_sources/main.py": "from theirs_for_sources.sub import part\nimport torch\n",
        "theirs_for_sources/sub/__init__.py": "from ..low import x\n",
        "theirs_for_sources/sub/part.py": "from benchmark.core.errors import MethodError\n",
        "theirs_for_sources/low.py": "x = 1\n",
        "theirs_for_sources/unused.py": "",
    }
    folder = tmp_path / "lib" / "site-packages"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(written(folder, files)))
    return folder


def test_the_closure_of_a_module_is_its_package_and_ours(package: Path) -> None:
    found = closure("theirs_for_sources.main").keys()
    theirs = {"__init__.py", "main.py", "sub/__init__.py", "sub/part.py", "low.py"}
    assert {f"theirs_for_sources/{name}" for name in theirs} <= found
    assert {"benchmark/__init__.py", "benchmark/core/errors.py"} <= found
    assert not any(name.startswith(("theirs_for_sources/unused", "torch")) for name in found)
    assert "theirs_for_sources" not in sys.modules  # read, not run


def test_an_installed_package_is_known_by_its_version_to_others(
    package: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, {"mine.py": "import theirs_for_sources.main"}) / "mine.py"
    assert closure(file).keys() == {"./mine.py"}


def test_what_is_on_the_path_but_not_installed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "checkout", {"checked_out/__init__.py": "", "checked_out/a.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    file = written(tmp_path / "mine", {"mine.py": "import checked_out.a"}) / "mine.py"
    assert {"checked_out/__init__.py", "checked_out/a.py"} < closure(file).keys()


@pytest.mark.parametrize("edited", ["mine.py", "helper.py", "pack/inner.py"])
def test_an_edit_gives_another_fingerprint_and_its_undoing_the_first(
    tmp_path: Path, edited: str
) -> None:
    files = {
        "mine.py": "import helper", "helper.py": "import pack.inner", "pack/inner.py": "",
        "no.py": "",
    }  # fmt: skip
    file = written(tmp_path, files) / "mine.py"
    before = fingerprint(file)
    written(tmp_path, {"no.py": "x = 1"})
    assert fingerprint(file) == before
    written(tmp_path, {edited: f"{files[edited]}\nx = 1"})
    assert fingerprint(file) != before
    written(tmp_path, {edited: files[edited]})
    assert fingerprint(file) == before


def test_where_it_lies_is_no_part_of_it(tmp_path: Path) -> None:
    files = {"mine.py": "import helper", "helper.py": ""}
    one, other = written(tmp_path / "a", files), written(tmp_path / "b", files)
    assert fingerprint(one / "mine.py") == fingerprint(other / "mine.py")


def test_a_move_between_files_is_a_change(tmp_path: Path) -> None:
    one = written(tmp_path / "a", {"mine.py": "import helper\n", "helper.py": "x"})
    other = written(tmp_path / "b", {"mine.py": "import helper\nx", "helper.py": ""})
    assert fingerprint(one / "mine.py") != fingerprint(other / "mine.py")


def test_a_method_that_ships_depends_on_what_is_below_it() -> None:
    found = closure("attacks.gauge_align").keys()
    assert {"attacks/gauge_align.py", "benchmark/anatomy/alignment.py"} <= found
    assert not any(name.startswith(("benchmark/pipeline", "defenses")) for name in found)


def test_a_module_loaded_from_a_file_is_that_file(tmp_path: Path) -> None:
    from benchmark.api.methods import DEFENSES

    text = (
        "from dataclasses import dataclass\nfrom benchmark.api import Defense\n"
        "@dataclass(frozen=True)\nclass D(Defense):\n    pass\n"
    )
    file = written(tmp_path, {"mine.py": text}) / "mine.py"
    module = DEFENSES.get(f"{file}:D").__module__
    assert fingerprint(module) == fingerprint(file)


@pytest.mark.parametrize("start", [Path("nowhere.py"), "nowhere_at_all.module", "sys"])
def test_no_source_is_an_error(start: Path | str) -> None:
    with pytest.raises(UsageError, match=r"no such file|no source of"):
        fingerprint(start)
