"""A result depends on the code that computes it, and on no other code."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmark.pipeline.fingerprint import sha, source_hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A defense in a file of its own that leans on a module of this project."""
    (tmp_path / "fingerprinted.py").write_text("from benchmark.core.data import Split\nX = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("fingerprinted")
    yield tmp_path
    sys.modules.pop("fingerprinted")
    source_hash.cache_clear()


def fresh(module: str) -> str:
    source_hash.cache_clear()
    return source_hash(module)


def test_an_edit_gives_another_hash(package: Path) -> None:
    before = fresh("fingerprinted")
    assert fresh("fingerprinted") == before
    (package / "fingerprinted.py").write_text("from benchmark.core.data import Split\nX = 2\n")
    assert fresh("fingerprinted") != before


def test_an_edit_below_gives_another_hash(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, other = fresh("fingerprinted"), fresh("benchmark.api.specs")
    edited = package / "edited.py"
    edited.write_text("Split = None\n")
    monkeypatch.setattr(sys.modules["benchmark.core.data"], "__file__", str(edited))
    assert fresh("fingerprinted") != before
    assert fresh("benchmark.api.specs") == other


def test_keys_do_not_depend_on_the_order_of_names() -> None:
    assert sha({"a": 1, "b": 2}) == sha({"b": 2, "a": 1})
    assert sha([1, 2]) != sha([2, 1])
    assert sha("ab", "c") != sha("a", "bc")
