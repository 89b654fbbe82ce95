"""Folders that are replaced in one step, and never more of them than was made here.

What is written goes to a hidden sibling first. Where the system can exchange two folders (Linux,
macOS) that is the whole step; elsewhere two renames are, and a run that was killed between them
leaves both beside each other, from which the next one goes on. Siblings of writers that were killed
are removed by the next one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmark.core.errors import UsageError

#: Lists what was made, so that a later run removes nothing else.
MARKER = ".unmergebench"
#: Below the hidden sibling: what is being made, what is whole, and what it replaces.
_MAKING, _WHOLE, _OLD = "making", "whole", "old"


def check_ours(out: Path, ours: Collection[str] = (), marker: str = MARKER) -> None:
    """Raise UsageError if a folder holds files, hidden ones too, that no earlier run made.

    ``ours``: names of files that count as made here where no marker says what was.
    """
    held = {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    made = {marker, *ours}
    with suppress(OSError, ValueError, TypeError):
        made = {marker, *json.loads((out / marker).read_text(encoding="utf-8"))}
    if found := sorted(held - made):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(
            f"{out} also holds {found[0]}{more}, which was not made here; move it, or change --out"
        )


@contextmanager
def replacing_folder(out: Path, marker: str = MARKER) -> Iterator[Path]:
    """An empty folder that takes the place of ``out``, whole, on success; nothing on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    sibling = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
    with _held(sibling):
        try:
            made = sibling / _MAKING
            made.mkdir()  # with the user's own mode, unlike mkdtemp's
            yield made
            files = (path for path in made.rglob("*") if path.is_file())
            names = sorted([*(path.relative_to(made).as_posix() for path in files), marker])
            (made / marker).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
            made.rename(sibling / _WHOLE)
            _put(sibling, out)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish what a killed run had whole, and remove what other killed runs left beside ``out``."""
    for sibling in sorted(out.parent.glob(f"{_prefix(out)}*")):
        if not sibling.is_dir():
            continue
        with _held(sibling) as free:
            if not free:
                continue  # somebody writes there now
            if not os.path.lexists(out):
                for name in (_WHOLE, _OLD):
                    if (sibling / name).is_dir():
                        (sibling / name).rename(out)
                        break
            shutil.rmtree(sibling, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.new-"


def _put(sibling: Path, out: Path) -> None:
    """Let the whole folder and ``out`` trade places."""
    whole = sibling / _WHOLE
    if not os.path.lexists(out):
        whole.rename(out)
        return
    if _exchange(whole, out):
        return
    out.rename(sibling / _OLD)
    try:
        whole.rename(out)
    except BaseException:
        (sibling / _OLD).rename(out)
        raise


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two folders in one step, where the system and the file system can."""
    paths = os.fsencode(one), os.fsencode(two)
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":  # RENAME_EXCHANGE, below the current folder: AT_FDCWD
            return bool(library.renameat2(-100, paths[0], -100, paths[1], 2) == 0)
        if sys.platform == "darwin":  # RENAME_SWAP
            return bool(library.renamex_np(*paths, 2) == 0)
    return False


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder while it is written to; whether nobody else does.

    A lock of the system's own goes with the process that holds it, whatever ends it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where an open folder cannot be renamed anyway
        yield True
        return
    free, handle = False, -1
    with suppress(OSError):  # gone meanwhile, or somebody's
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    try:
        yield free
    finally:
        if handle >= 0:
            os.close(handle)
