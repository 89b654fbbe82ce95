"""A full disk, or one that can only be read: one line, nothing half-written, nothing damaged."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from disk import contents, write
from safetensors import SafetensorError

from benchmark import cli as command
from benchmark.core.paths import cache as cache_folder
from benchmark.pipeline.store import Store
from benchmark.testbeds.kept import kept

#: As safetensors says it.
FULL = "I/O error: No space left on device (os error 28)"
TENSORS = {"x": torch.arange(5)}


def full(*_: object, **__: object) -> None:
    raise SafetensorError(FULL)


def keep() -> None:
    kept("thing", "0" * 64, lambda: TENSORS)


def file_state() -> None:
    store = Store(cache_folder() / "store")
    try:
        with store.claimed("key", {"x": torch.zeros(5)}) as slot:
            slot.write(TENSORS)
    finally:
        store.close()


@pytest.mark.parametrize("writing", [keep, file_state])
def test_a_full_disk_is_named_by_its_number(
    writing: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        writing()
    assert caught.value.errno == errno.ENOSPC
    left = [p.name for p in cache_folder().rglob("*safetensors*") if not p.name.endswith(".lock")]
    assert not left


@pytest.mark.parametrize("adapter", ["--adapter", "--no-adapter"])
def test_a_folder_that_does_not_fit_on_the_disk_is_one_line(
    adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, one, two = (write("bert", tmp_path / name) for name in ("base", "one", "two"))
    tensors = safetensors.torch.load((one / "model.safetensors").read_bytes())
    moved = {k: v + 0.1 if "query.weight" in k else v for k, v in tensors.items()}
    safetensors.torch.save_file(moved, one / "model.safetensors", {"format": "pt"})
    before = contents(tmp_path)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr("benchmark.io.tensorfiles.write", no_space)
    arguments = ["merge", base, one, two, "--coefficients", "0.5,0.5", adapter]
    arguments += ["--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["unmergebench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1
    assert "free some space" in error
    assert contents(tmp_path) == before


def test_what_a_testbed_kept_is_read_from_a_cache_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "lock")

    monkeypatch.setattr("benchmark.testbeds.kept.FileLock", refuse)
    keep()
