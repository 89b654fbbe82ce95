"""Every test runs offline, on one thread, with a cache of its own."""

from __future__ import annotations

import os

# Before torch and transformers are imported, or they would not see them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from benchmark.core.paths import cache as cache_folder

# A first call that imports a library, or a busy machine, is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# The user's own cache, before any test names another.
ASSETS = cache_folder() / "assets"

Cli = Callable[..., tuple[int, str]]


def with_assets(folder: Path, bases: Path | None = None) -> Path:
    """``folder`` as an empty cache that shares the user's assets (fetched there if need be).

    ``bases``: the ``testbeds`` of another cache, to share what testbeds keep: prepared data and
    pretrained bases, under file locks.
    """
    ASSETS.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "assets").symlink_to(ASSETS)
    if bases is not None:
        (folder / "testbeds").symlink_to(bases)
    return folder


def some_slow(values: list[str], slow: set[str]) -> list:
    """``values`` as parameters of a test; ``slow``: those that the default run leaves out."""
    assert slow <= set(values), f"no such parameters: {slow - set(values)}"
    return [
        pytest.param(value, marks=[pytest.mark.slow] if value in slow else []) for value in values
    ]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the tests that run real testbeds: experts are trained once, and what testbeds
    keep is made once for all of pytest's processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    (root / "bases").mkdir(exist_ok=True)
    return with_assets(tmp_path_factory.mktemp("home") / "cache", root / "bases")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by the zoo's names, open_clip, and data sets. Never written to by a test."""
    import declared as made

    root = tmp_path_factory.mktemp("declared")
    for name in ("vit", "clip", "clip-vision", "bert"):
        made.checkpoint(root / name, name)
    made.open_clip_folder(root / "open-clip")
    made.parquet(root / "one", made.COUNTS)
    made.imagefolder(root / "two", {"train": 50, "test": 20})
    made.csv(root / "texts", made.COUNTS)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which UNMERGEBENCH_CACHE names."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def cli() -> Cli:
    """``cli("show", "params")`` → exit code, and what was printed (the error line on failure)."""
    from typer.testing import CliRunner

    from benchmark.cli import app
    from benchmark.core.errors import UnmergeBenchError

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, UnmergeBenchError):
            return result.exception.exit_code, str(result.exception)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout or result.stderr

    return run
