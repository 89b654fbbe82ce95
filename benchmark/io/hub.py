"""Repositories of the model hub, fetched on request only and pinned by the commit that was found.

``KNOWN`` holds the commits we know for sure. Of every other repository the first ``unmergebench
assets fetch`` records the commit it resolved in the cache (``hub/pins.json``); from then on that
commit is what is loaded, fetched again, and part of every result's key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from benchmark.core.errors import AssetError
from benchmark.core.paths import cache, write_text

#: Repository → commit, each as several public projects pin it (data sets: MTEB among them).
KNOWN = {
    "model:openai/clip-vit-base-patch32": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "model:openai/clip-vit-base-patch16": "57c216476eefef5ab752ec549e440a49ae4ae5f3",
    "model:openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "dataset:tanganke/stanford_cars": "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
    "dataset:tanganke/dtd": "d2afa97d9f335b1a6b3b09c637aef667f98f966e",
    "dataset:ylecun/mnist": "77f3279092a1c1579b2250db8eafed0ad422088c",
}

#: What of a model repository is of use: no pickles, no weights of other frameworks.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and which of its files (globs; ``*`` also crosses folders)."""

    kind: Literal["model", "dataset"]
    name: str
    files: tuple[str, ...] = MODEL_FILES

    @property
    def _key(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Fetched:
    """A repository in the cache: its commit (40 hexadecimal digits) and the folder of its files."""

    commit: str
    folder: Path


def found(repository: Repository) -> Fetched | None:
    """The repository in the cache, or None. Downloads nothing."""
    pin = _pins().get(repository._key)
    try:
        fetched = Fetched(pin["commit"], home() / pin["folder"])  # type: ignore[index]
    except (KeyError, TypeError):
        return None
    return fetched if fetched.folder.is_dir() else None


def fetch(repository: Repository) -> Fetched:
    """Download the repository: at the commit recorded before, else at the known one, else at
    today's; which is recorded.

    Raises:
        AssetError: the hub cannot be reached, has no such repository, or it has no such files.
    """
    pin = _pins().get(repository._key)
    commit = pin.get("commit") if isinstance(pin, dict) else KNOWN.get(repository._key)
    try:
        commit, folder = _download(repository, commit)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise AssetError(
            f"cannot fetch the {repository.kind} {repository.name}: {_reason(error)}"
        ) from error
    if not any(path.suffix in (".safetensors", ".parquet") for path in folder.rglob("*")):
        wanted = "safetensors weights" if repository.kind == "model" else "parquet files"
        raise AssetError(
            f"the {repository.kind} {repository.name} at {commit[:12]} holds no {wanted}; "
            "nothing else is read"
        )
    _record(repository, Fetched(commit, folder))
    return Fetched(commit, folder)


def _download(repository: Repository, commit: str | None) -> tuple[str, Path]:
    """The commit and the local folder of its files."""
    from huggingface_hub import HfApi, snapshot_download

    if commit is None:
        commit = str(HfApi().repo_info(repository.name, repo_type=repository.kind).sha)
    folder = snapshot_download(
        repository.name,
        repo_type=repository.kind,
        revision=commit,
        allow_patterns=list(repository.files),
        cache_dir=home(),
    )
    return commit, Path(folder)


def _reason(error: Exception) -> str:
    """In a few words; never the address, which may hold a token."""
    name = type(error).__name__
    if name in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        return "the hub does not offer it (renamed, withdrawn, or open only after a login)"
    if isinstance(error, OSError) and error.errno == 28:
        return "the disk is full; free some space, or name another folder in UNMERGEBENCH_CACHE"
    if name == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE forbids it"
    return "the hub cannot be reached"


def home() -> Path:
    """Where fetched repositories lie."""
    return cache() / "hub"


def _pins() -> dict[str, Any]:
    try:
        content = json.loads((home() / "pins.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _record(repository: Repository, fetched: Fetched) -> None:
    home().mkdir(parents=True, exist_ok=True)
    with FileLock(home() / ".pins.lock"):  # two fetches at once lose nothing
        pin = {"commit": fetched.commit, "folder": str(fetched.folder.relative_to(home()))}
        write_text(
            home() / "pins.json", json.dumps(_pins() | {repository._key: pin}, indent=1) + "\n"
        )
