"""The content-addressed store: States in safetensors files, results in one SQLite file.

Keys are the sha256 of everything that determines a value, so what is there is right, by whomever it
was written: a killed run resumes where it stopped, and processes share work. Writes are atomic; a
damaged artifact is detected by its hash and made again. A cache that cannot be written to is read.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from benchmark.core.keys import sha
from benchmark.core.paths import replacing, sweep, writable
from benchmark.core.state import State, digest
from benchmark.io import tensorfiles
from benchmark.pipeline.results import Results

log = logging.getLogger(__name__)


class Store:
    """Values by key under ``root``; ``memory`` of them are kept in RAM, least recently used out."""

    def __init__(self, root: Path, memory: int = 16) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._recent: OrderedDict[str, Any] = OrderedDict()
        self.memory = memory
        self._results = Results(root / "results.sqlite")

    def close(self) -> None:
        self._results.close()

    def get(self, key: str) -> Any | None:
        """A stored JSON value, or None (also if its row is damaged)."""
        return self._results.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store a JSON value; the last writer wins, and all writers of a key agree."""
        self._results.put(key, value)

    def result(self, key: str, make: Callable[[], Any]) -> Any:
        """The stored value, computed and stored if it is not there."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def recent(self, key: str, make: Callable[[], Any]) -> Any:
        """A value kept in memory only, made again once it has fallen out."""
        value = self.remembered(key)
        return self.remember(key, make()) if value is None else value

    def remembered(self, key: str) -> Any | None:
        """What is kept in memory, or None."""
        if key in self._recent:
            self._recent.move_to_end(key)
        return self._recent.get(key)

    def remember(self, key: str, value: Any) -> Any:
        """Keep a value in memory; the least recently used fall out."""
        self._recent[key] = value
        while len(self._recent) > self.memory:
            self._recent.popitem(last=False)
        return value

    def forget(self) -> None:
        """Drop everything that is kept in memory."""
        self._recent.clear()

    @contextmanager
    def claimed(self, key: str, base: State) -> Iterator[Slot]:
        """The place on disk of one State. One process has it at a time; others wait for it."""
        path = self.root / "states" / f"{key}.safetensors"
        lock: AbstractContextManager[object] = nullcontext()
        if writable(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
        with lock:
            yield Slot(path, key, base)

    def training(self, key: str, number: int) -> Path:
        """The resume file of the ``number``-th training inside the node ``key``."""
        return self.root / "training" / f"{key}-{number}.pt"

    def forget_training(self, key: str) -> None:
        """Delete the resume files of a node that is made."""
        for path in (self.root / "training").glob(f"{key}-*.pt"):
            path.unlink(missing_ok=True)


class Slot:
    """A State kept on disk, as the tensors in which it differs from ``base``.

    Its hash is of its key too: a file under another's name is not believed.
    """

    def __init__(self, path: Path, key: str, base: State) -> None:
        self._path, self._key, self._base = path, key, base

    def write(self, state: State) -> None:
        base = self._base
        moved = {
            k: v.detach().cpu().contiguous()
            for k, v in state.items()
            if not torch.equal(v, base[k])
        }
        sweep(self._path)
        with replacing(self._path) as temporary:
            tensorfiles.save(temporary, moved, {"sha256": sha(self._key, digest(moved))})

    def read(self) -> State | None:
        """The State, or None where there is none or it is damaged."""
        path, base = self._path, self._base
        if not path.exists():
            return None
        device = next(iter(base.values())).device
        try:
            with safe_open(path, framework="pt") as file:
                moved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                recorded = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s is damaged (%s): made again", path.name, error)
            return None
        if sha(self._key, digest(moved)) != recorded or not moved.keys() <= base.keys():
            log.warning("%s does not match its key and hash: made again", path.name)
            return None
        return {k: moved[k].to(device) if k in moved else v for k, v in base.items()}
