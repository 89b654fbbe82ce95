"""Measured outcomes by key, in one SQLite file.

A row is believed only if its hash fits its key and value. A file that SQLite finds damaged is set
aside, and a new one takes over what can still be read of it; the rest is computed again. In a cache
that cannot be written to, what is there is read.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmark.core.errors import disk_trouble
from benchmark.core.keys import sha
from benchmark.core.paths import set_aside, writable

log = logging.getLogger(__name__)

#: What SQLite raises; the second, where a message of its own quotes a damaged schema.
_Trouble = (sqlite3.DatabaseError, UnicodeDecodeError)
#: Second word of an error's name where it is the disk's or another process's, and not the file's.
_MACHINE = {"FULL", "CANTOPEN", "IOERR", "BUSY", "LOCKED", "PERM", "NOMEM", "PROTOCOL", "NOLFS"}


class Results:
    """JSON values by key in the file ``path``. Raises OSError where the disk is the trouble."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writable = writable(path.parent)
        with self._opening():
            self._open()

    def close(self) -> None:
        self._database.close()

    def get(self, key: str) -> Any | None:
        """A stored value, or None (also if its row is damaged)."""
        row = self._ask("SELECT key, value, sha256 FROM results WHERE key = ?", (key,))
        return json.loads(row[1]) if row is not None and row[0] == key and _sound(row) else None

    def put(self, key: str, value: Any) -> None:
        """Store a value; the last writer wins, and all writers of a key agree."""
        text = json.dumps(value, sort_keys=True)
        row = (key, text, sha(key, text))
        self._ask("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", row)

    def _ask(self, statement: str, row: tuple[str, ...]) -> tuple[Any, ...] | None:
        for tried in (False, True):
            try:
                found: tuple[Any, ...] | None = self._database.execute(statement, row).fetchone()
                return found
            except _Trouble as error:
                if tried or not self._is_damage(error):
                    raise disk_trouble(error, self._path) from error
                self._start_over(error)
        raise AssertionError("unreachable")

    def _opening(self) -> AbstractContextManager[object]:
        """SQLite waits for locks, but not for the one that a new file's write-ahead log takes."""
        return FileLock(self._path.with_name(".opening.lock")) if self._writable else nullcontext()

    def _open(self) -> None:
        try:
            self._database = self._connect(self._path, self._writable)
        except _Trouble as error:
            if not self._is_damage(error):
                raise disk_trouble(error, self._path) from error
            self._renew(error)
        self._file = _identity(self._path)

    @staticmethod
    def _connect(path: Path, to_write: bool = True) -> sqlite3.Connection:
        if not to_write:
            # Elsewhere SQLite would make a shared-memory file beside it, even to read.
            return _lenient(sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True))
        database = _lenient(sqlite3.connect(path, timeout=60, isolation_level=None))
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT, sha256 TEXT)"
            )
        except BaseException:
            database.close()
            raise
        return database

    def _is_damage(self, error: Exception) -> bool:
        """Whether the file is to blame, and can be replaced."""
        kind = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT").split("_")[1]
        if kind == "READONLY":  # a damaged header says so, too
            return self._writable and os.access(self._path, os.W_OK)
        return self._writable and kind not in _MACHINE

    def _start_over(self, error: Exception) -> None:
        with suppress(*_Trouble):
            self._database.close()
        with self._opening():
            if _identity(self._path) == self._file:
                self._renew(error)
                self._file = _identity(self._path)
            else:  # another process was faster
                self._open()

    def _renew(self, error: Exception) -> None:
        """Set the damaged file aside and open a new one with what can be read of it."""
        aside = set_aside(self._path)
        with suppress(FileNotFoundError):  # what is in the log belongs to the file
            Path(f"{self._path}-wal").replace(f"{aside}-wal")
        with suppress(FileNotFoundError):
            Path(f"{self._path}-shm").unlink()
        self._database = self._connect(self._path)
        try:
            with self._database:
                self._database.execute("BEGIN")
                for row in _readable(aside):
                    self._database.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", row)
            (kept,) = self._database.execute("SELECT count(*) FROM results").fetchone()
        except _Trouble as trouble:
            raise disk_trouble(trouble, self._path) from trouble
        log.warning(
            "%s is damaged (%s): set aside as %s; %d results of it are kept, others computed again",
            self._path.name, error, aside.name, kept,
        )  # fmt: skip


def _lenient(database: sqlite3.Connection) -> sqlite3.Connection:
    """Text that is not UTF-8 fails its hash instead of the query."""
    database.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return database


def _sound(row: tuple[Any, ...]) -> bool:
    key, text, recorded = row
    return isinstance(text, str) and sha(key, text) == recorded


def _readable(path: Path) -> Iterator[tuple[Any, ...]]:
    """The sound rows before the first damage and after the last one."""
    for order in ("ASC", "DESC"):
        with suppress(*_Trouble), closing(_lenient(sqlite3.connect(path))) as database:
            rows = database.execute(
                f"SELECT key, value, sha256 FROM results ORDER BY rowid {order}"
            )
            yield from filter(_sound, rows)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino
