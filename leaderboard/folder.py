"""The folder of entries: ``<defense>/<version>.json``, one file per version, written atomically."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import ValidationError

from benchmark.errors import UnmergeBenchError
from benchmark.paths import write_text
from leaderboard import strict
from leaderboard.entry import SCHEMA_VERSION, Certificate, Entry

if TYPE_CHECKING:
    import pandas as pd

#: Where a checkout of the project keeps them.
ENTRIES = Path("leaderboard/entries")


def slug(spec: str) -> str:
    """A folder name for a defense: ``params(scaling=symmetric)`` → ``params-scaling-symmetric``."""
    name = re.sub(r"[^a-z0-9+.]+", "-", spec.lower()).strip("-.")
    return (name or "defense")[:100]


def parse(data: bytes, what: str) -> Entry:
    """An entry from the bytes of a file.

    Raises:
        Malformed: no JSON a stranger may send, or not of the schema; names the first field.
    """
    found = strict.loads(data, what)
    if not isinstance(found, dict):
        raise strict.Malformed(f"{what}: not an entry, but a {type(found).__name__}")
    try:
        return Entry.model_validate(migrated(found, what))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise strict.Malformed(f"{what}: {field}: {first['msg']}") from None
    except RecursionError:
        raise strict.Malformed(f"{what}: nested too deeply") from None


def migrated(found: dict[str, Any], what: str) -> dict[str, Any]:
    """An entry of an older schema as one of today's. There is one schema so far.

    Raises:
        Malformed: no version, or one this code does not know.
    """
    version = found.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise strict.Malformed(
            f"{what}: schema version {version!r}; this code reads {SCHEMA_VERSION}"
        )
    return found


def read(path: Path) -> Entry:
    """One entry from disk. Raises as :func:`parse`, and if it is no plain file."""
    if path.is_symlink() or not path.is_file():
        raise strict.Malformed(f"{path} is no plain file")
    if path.stat().st_size > strict.MAX_BYTES:
        raise strict.Malformed(f"{path}: over {strict.MAX_BYTES // 2**20} MiB")
    return parse(path.read_bytes(), str(path))


def everything(folder: Path) -> Iterator[tuple[Path, Entry]]:
    """All entries of a folder, in the order of their paths.

    Raises:
        Malformed: a file that is no entry, a link, or one whose place is not its own.
    """
    if not folder.is_dir():
        raise UnmergeBenchError(
            f"{folder} is no folder of entries; `unmergebench submit` makes one"
        )
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.is_symlink():
            raise strict.Malformed(f"{path.parent} is a link")
        entry = read(path)
        if path_of(folder, entry) != path:
            raise strict.Malformed(f"{path} holds {entry.defense.spec} {entry.version}; move it")
        yield path, entry


def path_of(folder: Path, entry: Entry) -> Path:
    """Where an entry belongs. Both parts are slugs: no name leads out of the folder."""
    return folder / slug(entry.defense.spec) / f"{entry.version}.json"


def write(folder: Path, entry: Entry) -> Path:
    """Write an entry to its place, atomically."""
    path = path_of(folder, entry)
    write_text(path, json.dumps(entry.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
    return path


def certify(path: Path, certificate: Certificate) -> Entry:
    """Add a certificate to the entry at ``path``, whatever was added meanwhile."""
    folder = path.resolve().parent.parent
    with locked(folder):
        entry = read(path)
        changed = entry.model_copy(update={"certificates": (*entry.certificates, certificate)})
        if path_of(folder, entry) != path.resolve():
            raise strict.Malformed(f"{path} is not at its place in a folder of entries")
        write(folder, changed)
    return changed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=600):
        yield


def load_entries(folder: str | Path = ENTRIES, *, all_versions: bool = False) -> pd.DataFrame:
    """One row per entry that counts (or per entry): its suite, version, hash, and what follows
    from its cells (:data:`leaderboard.runs.COLUMNS`).

    Raises:
        Malformed: a file there is no entry.
    """
    import pandas as pd

    from leaderboard.runs import COLUMNS, board, record

    facts = ["suite", "suite_hash", "version", "created", "credit", "superseded_by", "invalidated"]
    rows = []
    for _, entry in everything(Path(folder)):
        if all_versions or entry.stands:
            (row,) = board(entry.cells, lambda spec, card=entry.defense.card: card).rows  # type: ignore[misc]
            known = entry.model_dump(include={*facts} - {"suite"})
            own = {"suite": entry.suite.name, "suite_hash": entry.suite.hash}
            rows.append({**known, **own, **record(row)})
    return pd.DataFrame(rows, columns=[*facts, *COLUMNS])
