"""The folder of entries: ``<defense>/<version>.json``, one file per version, written atomically."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from pydantic import ValidationError

from benchmark.api import methods
from benchmark.api.contracts import Ensemble
from benchmark.core.errors import UnmergeBenchError
from benchmark.core.paths import write_text
from leaderboard import strict
from leaderboard.entry import SCHEMA_VERSION, Certificate, Entry
from leaderboard.paths import ENTRIES

if TYPE_CHECKING:
    import pandas as pd

_DEVICE = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")


class Older(strict.Malformed):
    """An entry of earlier rules: an earlier schema, or judged by an earlier version of the standard
    attacker. It stays where it is, as history, and does not stand."""


def slug(spec: str) -> str:
    """A folder name for a defense, on any file system, and another one for each spec.

    ``params`` → ``params``; ``params(scaling=symmetric)`` → ``params-scaling-symmetric-`` and eight
    digits of the spec's sha256, as always when the name is not the spec itself.
    """
    name = re.sub(r"[^a-z0-9+.]+", "-", spec.lower())[:80].strip("-.")
    if not name or _DEVICE.match(name):
        name = f"defense-{name}".rstrip("-")
    if name == spec:
        return name
    return f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def parse(data: bytes, what: str) -> Entry:
    """An entry from the bytes of a file.

    Raises:
        Older: made under an earlier scoring version, or of the standard attacker.
        Malformed: no JSON a stranger may send, or not of the schema; names the first field.
    """
    found = strict.loads(data, what)
    if not isinstance(found, dict):
        raise strict.Malformed(f"{what}: not an entry, but a {type(found).__name__}")
    _current(found, what)
    try:
        # As JSON and strictly: else the text "nan" would pass for a number.
        entry = Entry.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part)[:60] for part in first["loc"]) or "entry"
        raise strict.Malformed(f"{what}: {field}: {_line(first['msg'])}") from None
    _attacked(entry, what)
    return entry


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


def _current(found: dict[str, Any], what: str) -> None:
    """Refuse an entry of another schema than today's.

    Raises:
        Older: it was made under an earlier one.
        Malformed: no version, or one this code does not know.
    """
    version = found.get("schema_version")
    if type(version) is int and 1 <= version < SCHEMA_VERSION:
        raise Older(
            f"{what}: made under scoring version {version}, which today's rules cannot judge; it "
            "does not stand: run the defense again and submit that"
        )
    if type(version) is not int or version != SCHEMA_VERSION:
        shown = ascii(version)[:60]
        raise strict.Malformed(f"{what}: schema version {shown}; this code reads {SCHEMA_VERSION}")


def _attacked(entry: Entry, what: str) -> None:
    """Refuse an entry that an earlier version of the standard attacker judged.

    Raises:
        Older: so it was.
    """
    today = int(cast(Ensemble, methods.attack("auto").method).version)
    stated = {str(c.ensemble.get("version")) for c in entry.cells if c.attack.startswith("auto")}
    earlier = {str(number) for number in range(1, today)}
    if older := sorted(stated & earlier):
        raise Older(
            f"{what}: made under version {older[0]} of the standard attacker, today's is "
            f"{today}; it does not stand: run the defense again and submit that"
        )


def read(path: Path) -> Entry:
    """One entry from disk. Raises as :func:`parse`, and if it is no plain file."""
    return parse(strict.read(path), str(path))


def everything(folder: Path) -> Iterator[tuple[Path, Entry]]:
    """All entries of a folder, in the order of their paths, without those of older rules.

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
        try:
            entry = read(path)
        except Older:
            continue
        if path_of(folder, entry) != path:
            raise strict.Malformed(
                f"{path} holds {entry.defense.spec} {entry.version}; "
                f"move it to {path_of(folder, entry)}"
            )
        yield path, entry


def misplaced(path: Path, entry: Entry) -> Iterator[str]:
    """What is wrong with the place of an entry, and with what it says of its other versions."""
    home = path.absolute().parent
    if path_of(home.parent, entry) != path.absolute():
        yield f"its place is {path_of(Path('.'), entry)} in a folder of entries"
        return
    others = [other for where, other in versions(home) if where.name != path.name]
    later = [o for o in others if o.suite.name == entry.suite.name and o.number > entry.number]
    if entry.superseded_by and entry.superseded_by not in {o.version for o in later}:
        yield f"superseded by {entry.superseded_by}, which is no later version here"
    if not entry.superseded_by and any(o.stands for o in later):
        yield "a later version stands beside it; it should say superseded_by"


def versions(home: Path) -> Iterator[tuple[Path, Entry]]:
    """The entries of one defense's folder, without those of older rules. Raises as ``read``."""
    for path in sorted(home.glob("*.json")):
        try:
            found = read(path)
        except Older:
            continue
        yield path, found


def path_of(folder: Path, entry: Entry) -> Path:
    """Where an entry belongs. Both parts are slugs: no name leads out of the folder."""
    return folder / slug(entry.defense.spec) / f"{entry.version}.json"


def write(folder: Path, entry: Entry) -> Path:
    """Write an entry to its place, atomically.

    Raises:
        Malformed: it could not be read again (an invisible character in a note, say).
    """
    path = path_of(folder, entry)
    text = json.dumps(entry.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    parse(text.encode(), str(path))
    write_text(path, text)
    return path


def certify(path: Path, certificate: Certificate) -> Entry:
    """Add a certificate to the entry at ``path``, whatever was added meanwhile.

    Raises:
        Malformed: it is no entry, or not at its place in a folder of entries.
    """
    folder = path.absolute().parent.parent
    if path_of(folder, read(path)) != path.absolute():
        raise strict.Malformed(f"{path} is not at its place in a folder of entries")
    with locked(folder):
        entry = read(path)
        changed = entry.model_copy(update={"certificates": (*entry.certificates, certificate)})
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
