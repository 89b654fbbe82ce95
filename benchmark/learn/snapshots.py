"""What a killed training needs to continue: parameters, optimizer, schedule, generator, batches."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.api.contracts import Testbed
from benchmark.api.recipe import Loss, Recipe
from benchmark.core.data import Split
from benchmark.core.paths import replacing
from benchmark.core.state import State, digest
from benchmark.learn.batches import Batches

log = logging.getLogger(__name__)

#: Seconds of training between two snapshots. A training shorter than this leaves no file.
SAVE_EVERY = 30.0
_FORMAT = 1  # of the file: raise it when what is in it changes


class Snapshots:
    """The resume file of one training, or nothing where ``path`` is None.

    Written at most every ``SAVE_EVERY`` seconds, when Ctrl-C stops the training, and, if it took
    that long, at its end. Atomic; a damaged file, or one of another training, is ignored. ``what``
    (testbed, recipe, loss), ``start``, the examples and the state of ``rng`` say whose file it is;
    of a loss only its name counts, so the caller gives each loss its own file.
    """

    def __init__(
        self,
        path: Path | None,
        what: tuple[Testbed, Recipe, Loss],
        start: State,
        examples: Mapping[str, Split],
        rng: torch.Generator,
    ) -> None:
        self.path = path
        self._what, self._start, self._examples = what, start, examples
        self._rng, self._began = rng, rng.get_state()
        self._whole = True  # not in the middle of a step
        self._done = self._steps = 0
        self._written = False

    @cached_property
    def _identity(self) -> str:
        # Hashing a large model takes a while: only where there is a file to read or to write.
        testbed, recipe, loss = self._what
        device = next(iter(self._start.values())).device.type
        parts = [
            _FORMAT,
            torch.__version__,
            device,
            testbed.content_hash(),
            recipe,
            getattr(loss, "__qualname__", type(loss).__qualname__),
            digest({"start": self._began}),
            digest(self._start),
            {name: split.digest() for name, split in sorted(self._examples.items())},
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def restore(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        streams: Sequence[Batches],
    ) -> int:
        """Put what the file holds into the running parts: the number of steps already done."""
        self._parts = (parameters, optimizer, schedule, streams)
        self._last = time.monotonic()
        found = self._read()
        if found is None:
            return 0
        with torch.no_grad():
            for key, value in parameters.items():
                value.copy_(found["parameters"][key])
        if found["optimizer"] is not None:
            optimizer.load_state_dict(found["optimizer"])
            schedule.load_state_dict(found["schedule"])
        for stream, (order, position) in zip(streams, found["streams"], strict=True):
            stream.order, stream.position = order, position
        self._rng.set_state(found["rng"])
        self._done, self._written = found["done"], True
        return self._done

    @contextmanager
    def step(self, step: int, steps: int) -> Iterator[None]:
        """Around step ``step`` (from 0): afterwards a snapshot is written if one is due."""
        self._whole = False
        yield
        self._whole = True
        self._done, self._steps = step + 1, steps
        due = time.monotonic() - self._last >= SAVE_EVERY
        # A training that once took long enough to be kept is kept as finished too.
        if due or (self._written and self._done == steps):
            self.save()

    def save(self) -> None:
        """Write the file now, unless a step was broken off (then the last one written stands)."""
        if self.path is None or not self._whole or not self._done:
            return
        parameters, optimizer, schedule, streams = self._parts
        finished = self._done == self._steps
        content = {
            "identity": self._identity,
            "done": self._done,
            "parameters": {key: value.detach() for key, value in parameters.items()},
            "optimizer": None if finished else optimizer.state_dict(),
            "schedule": None if finished else schedule.state_dict(),
            "streams": [(stream.order, stream.position) for stream in streams],
            "rng": self._rng.get_state(),
        }
        try:
            with replacing(self.path) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for a full disk
            log.warning("cannot keep the training's progress in %s: %s", self.path.name, error)
        self._written = True
        self._last = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch itself checks no checksums
                if archive.testzip() is not None:
                    raise ValueError("wrong checksum")
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the readers raise
            log.warning("%s is damaged (%s): training starts over", self.path.name, error)
            return None
        if not isinstance(content, dict) or content.get("identity") != self._identity:
            log.warning("%s is of another training: this one starts over", self.path.name)
            return None
        return content


@contextmanager
def interruptible(snapshots: Snapshots) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step, where the training can be saved; a second one does not.

    Yields what the loop calls after every step. Without a file to write, or outside the main
    thread, signals are left as they are.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    ours = (
        snapshots.path is not None
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    try:
        if ours:
            signal.signal(signal.SIGINT, ask)
        yield check
        check()
    except KeyboardInterrupt:
        snapshots.save()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
