"""Where things are kept between runs, and how files are written so that nothing is half-written."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmark.core.errors import UsageError


def cache() -> Path:
    """The cache root: ``UNMERGEBENCH_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("UNMERGEBENCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unmergebench"


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder: not where the disk or its owner lets us only read."""
    return os.access(folder, os.W_OK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it replaces ``path`` only on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private; the result is an ordinary file
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, under which it is kept; an earlier one is kept, too."""
    number, aside = 1, path.with_suffix(".damaged")
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".damaged-{number}")
    path.replace(aside)
    return aside


def sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left. Only for the one who may write to it now."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            stale.unlink()


def read_text(path: Path) -> str:
    """A text file that a user wrote, in UTF-8, with or without a byte-order mark.

    Raises:
        UsageError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not in UTF-8; save it so") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
