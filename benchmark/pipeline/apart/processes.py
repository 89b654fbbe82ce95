"""The parent's end: a child process that is asked for one thing after another, and a few of them.

A child ends with its owner: when the pool drops it, at exit, or (it sees its pipe close) when this
process is killed.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmark.core import errors
from benchmark.core.errors import MethodError, UnmergeBenchError
from benchmark.core.paths import cache
from benchmark.pipeline.apart import lines

log = logging.getLogger(__name__)

#: Processes kept at a time; each holds torch and one victim.
ALIVE = 4
#: Seconds that a child has after Ctrl-C to finish its training step and keep its progress.
GRACE = 30.0

#: What a child says besides ``done`` and ``failed`` → the reply to it, or None.
Answers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any] | None]]

# Where caches, data sets, tokens and package indexes are found.
_DROPPED = ("UNMERGEBENCH_", "HF_", "HUGGING", "XDG_", "TRANSFORMERS_", "TORCH_HOME", "PIP_")


class Folder:
    """A private temporary folder, gone with the object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="unmergebench-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Process:
    """A child that runs the defense ``spec``. ``bound``: the victim it serves, once it has one."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.bound: tuple[str, str] | None = None
        self._folder = Folder()
        self._lock = threading.RLock()
        root = self._folder.path
        self._popen = subprocess.Popen(
            # -P: the folder one stands in is no place to import torch or benchmark from.
            [sys.executable, "-P", "-m", "benchmark.pipeline.apart.child", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(root),
            # Out of the terminal's group: Ctrl-C comes once, from here.
            start_new_session=True,
        )
        # Not a method, which would keep the object alive.
        self.end = weakref.finalize(self, _end, self._popen, self._folder)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, do: str, answers: Answers | None = None, **arguments: Any) -> dict[str, Any]:
        """Have the child do one thing; what it says meanwhile goes to ``answers``.

        Raises:
            UnmergeBenchError: what went wrong there, as it would be raised here; a
                :class:`MethodError` for any other exception and for a process that ended.
            KeyboardInterrupt: Ctrl-C, after the child has kept the progress of its training.
        """
        with self._lock:
            try:
                return self._ask(do, answers or {}, arguments)
            except KeyboardInterrupt:
                self._interrupt(patiently=answers is not None)
                raise
            except _Failed as failed:
                raise failed.error from None
            except BaseException:
                self.end()  # somewhere in the middle: what it says next would answer nothing
                raise

    def _ask(self, do: str, answers: Answers, arguments: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._popen.stdin, self._popen.stdout
        assert stdin is not None
        assert stdout is not None
        message: Mapping[str, Any] | None = {"do": do, **arguments}
        while True:
            if message is not None:
                try:
                    lines.send(stdin, message)
                except OSError:
                    raise MethodError(self._last_words()) from None
            said = lines.receive(stdout)
            if said is None:
                raise MethodError(self._last_words())
            what = said.pop("say", None)
            if what == "done":
                return said
            if what == "failed":
                log.debug("in the process of %s:\n%s", self.spec, said.get("traceback"))
                raise _Failed(_raised(said))
            if what not in answers:
                raise lines.Broken(f"the defense's process said {str(what)[:40]!r} out of turn")
            message = answers[what](said)

    def _last_words(self) -> str:
        """How the child ended, once its pipe has."""
        try:
            code = self._popen.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            return "the defense's process closed its pipe"
        if code < 0:
            return f"the defense's process was killed by {signal.Signals(-code).name}"
        return f"the defense's process ended with exit code {code}"

    def _interrupt(self, patiently: bool) -> None:
        """Pass Ctrl-C on and wait; a second one, or none of our patience, does not wait."""
        try:
            if patiently and self.alive:
                self._popen.send_signal(signal.SIGINT)
                self._popen.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            log.warning("%s does not stop; its process is ended", self.spec)
        finally:
            self.end()


class _Failed(Exception):
    """The child said that it failed; it is ready for the next thing."""

    def __init__(self, error: UnmergeBenchError) -> None:
        super().__init__(str(error))
        self.error = error


def _raised(said: Mapping[str, Any]) -> UnmergeBenchError:
    """The error that the child reports, if it is one of ours; else a MethodError."""
    kind = getattr(errors, str(said.get("kind")), None)
    ours = isinstance(kind, type) and issubclass(kind, UnmergeBenchError)
    text = " ".join(str(said.get("text")).split())[:2000]
    return kind(text) if ours and kind is not None else MethodError(text)


def _end(popen: subprocess.Popen[bytes], folder: Folder) -> None:
    popen.kill()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not flushed has no reader any more
                pipe.close()
    popen.wait()
    folder.remove()


def _environment(root: Path) -> dict[str, str]:
    """This process's variables, without those that lead to data, and with folders of its own."""
    hidden = str(cache())
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_DROPPED) and hidden not in value
    }
    home, temporary, none = root / "home", root / "tmp", root / "no-cache-here"
    for folder in (home, temporary):
        folder.mkdir()
    none.touch()  # a file: nothing can be looked up or kept below it
    own = dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(temporary))
    return {
        **kept,
        **own,
        "HOME": str(home),
        "USERPROFILE": str(home),
        "UNMERGEBENCH_CACHE": str(none),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        # Another home must not hide packages, nor another start the user's own modules.
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


#: Most recently used last.
_pool: list[Process] = []


def begin(spec: str) -> Process:
    """A new child of the pool; of too many the one that rested longest ends."""
    process = Process(spec)
    _pool.append(process)
    while len(_pool) > ALIVE:
        _pool.pop(0).end()
    return process


def found(spec: str, bound: tuple[str, str]) -> Process | None:
    """A living child for ``spec`` that serves ``bound``, or nobody yet."""
    _pool[:] = [process for process in _pool if process.alive]
    for wanted in (bound, None):
        for process in _pool:
            if process.spec == spec and process.bound == wanted:
                _pool.append(_pool.pop(_pool.index(process)))
                return process
    return None


def close() -> None:
    """End all children."""
    while _pool:
        _pool.pop().end()
