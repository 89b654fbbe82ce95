"""Where a name in a testbed.toml leads: a folder or file beside it, or a pinned hub repository."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmark.core.errors import AssetError, UsageError
from benchmark.io.folders import files_below
from benchmark.io.hub import MODEL_FILES

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Place:
    """A local path, or a repository of the hub at one commit."""

    name: str
    path: Path | None = None
    revision: str = ""

    @property
    def content(self) -> str:
        """What determines its bytes: a hash of the local files, or the commit.

        Raises:
            AssetError: a local file cannot be read.
        """
        return f"{self.name}@{self.revision}" if self.path is None else hashed(self.path)


def place(name: str, root: Path, revision: str | None, field: str) -> Place:
    """The place ``name``: a path relative to ``root`` if there is one, else a hub id.

    Raises:
        UsageError: neither; or a hub id that no full commit pins.
    """
    path = Path(os.path.normpath(root / Path(name).expanduser()))
    if path.exists():
        return Place(name, path)
    if not _HUB_ID.match(name):
        raise UsageError(f"{field}: no such file or folder: {path}")
    if not revision or not _COMMIT.match(revision):
        raise UsageError(
            f"{field}: no folder {path}, and as a hub id {name!r} needs its pin: "
            'revision = "<the full commit, 40 hexadecimal digits>"'
        )
    return Place(name, None, revision)


def folder(found: Place, kind: Literal["model", "dataset"] = "model") -> Path:
    """The local folder (or file) of a place; a hub repository is fetched, or found in its cache.

    Raises:
        AssetError: it is in no local cache and cannot be fetched.
    """
    if found.path is not None:
        return found.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = list(MODEL_FILES) if kind == "model" else None
    try:
        local = snapshot_download(
            found.name, repo_type=kind, revision=found.revision, allow_patterns=wanted
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise unavailable(found, kind) from error
    return Path(local)


def unavailable(found: Place, kind: Literal["model", "dataset"]) -> AssetError:
    """What to fetch and how, in one line."""
    option = " --repo-type dataset" if kind == "dataset" else ""
    return AssetError(
        f"the {kind} {found.name!r} is not in the hub's local cache and cannot be fetched; where "
        f"there is network: hf download {found.name}{option} --revision {found.revision}; "
        "or name a local folder"
    )


def hashed(path: Path) -> str:
    """sha256 over a file, or over the names and bytes of a folder's visible files.

    A file is read again only when its size or time changes.
    """
    try:
        if path.is_file():
            return _file(str(path), path.stat().st_size, path.stat().st_mtime_ns)
        total = hashlib.sha256()
        for file in visible(path):
            stat = file.stat()
            one = _file(str(file), stat.st_size, stat.st_mtime_ns)
            total.update(f"{file.relative_to(path).as_posix()}\0{one}\0".encode())
    except OSError as error:
        raise AssetError(f"cannot read {error.filename or path}: {error.strerror}") from None
    return total.hexdigest()


def visible(path: Path) -> list[Path]:
    """Every file below the folder ``path`` that no hidden name leads to, sorted."""
    return [path / file for file in files_below(path) if not file.name.startswith(".")]


@functools.lru_cache(maxsize=1 << 16)
def _file(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
