"""What a method's own code asks about the world around it: clock, environment, process, callers.

Whoever knows whether a check is running can behave while it does. What is asked through a library,
or read as an attribute (``sys.argv``), is not seen.
"""

from __future__ import annotations

import datetime
import inspect
import os
import platform
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_CLOCK = {
    getattr(time, name)
    for name in dir(time)
    if callable(getattr(time, name)) and name not in ("sleep", "struct_time", "strftime")
}
_BUILTINS: dict[Any, str] = {
    **dict.fromkeys(_CLOCK, "the clock"),
    **dict.fromkeys((os.getpid, os.getppid, os.uname), "the process"),
    **dict.fromkeys((socket.gethostname, os.getlogin), "the host"),
    sys._getframe: "who calls it",
}
_FUNCTIONS: dict[CodeType, str] = {
    os._Environ.__getitem__.__code__: "the environment",
    os._Environ.__iter__.__code__: "the environment",
    os._Environ.copy.__code__: "the environment",
    platform.uname.__code__: "the host",
    inspect.stack.__code__: "who calls it",
    inspect.currentframe.__code__: "who calls it",
}
_STANDARD = Path(sysconfig.get_paths()["stdlib"]).resolve()
_BENCHMARK = Path(__file__).resolve().parents[1]
_INSTALLED = ("site-packages", "dist-packages")


class Owned:
    """The source files that are a method's own: those of its package, or of its file's folder."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._roots = {root for part in parts for root in _roots(type(part).__module__)}
        self._known: dict[str, bool] = {}

    def __call__(self, file: str) -> bool:
        if file not in self._known:
            self._known[file] = self._own(file)
        return self._known[file]

    def _own(self, file: str) -> bool:
        if file.startswith("<"):
            return not file.startswith("<frozen ")  # made from a string at run time
        path = Path(file).resolve()
        if path.is_relative_to(_BENCHMARK):
            return any(root == path for root in self._roots)
        return any(
            path == root
            or (path.is_relative_to(root) and not _in_libraries(path.relative_to(root).parts))
            for root in self._roots
        )


@contextmanager
def asked(owned: Owned) -> Iterator[list[str]]:
    """Collects what code of ``owned`` asks in the block, as ``the clock (my_file.py:12)``."""
    found: list[str] = []

    def see(frame: FrameType, event: str, argument: Any) -> None:
        caller: FrameType | None
        if event == "c_call":
            what, caller = _builtin(argument), frame
        elif event == "call" and frame.f_code in _FUNCTIONS:
            what, caller = _FUNCTIONS[frame.f_code], frame.f_back
        else:
            return
        while what and caller is not None:
            file = caller.f_code.co_filename
            if owned(file):
                found.append(f"{what} ({Path(file).name}:{caller.f_lineno})")
            if not _standard(file):
                return
            caller = caller.f_back

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _builtin(function: Any) -> str | None:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, datetime.date):
        return "the clock" if function.__name__ in ("now", "today", "utcnow") else None
    try:
        return _BUILTINS.get(function)
    except TypeError:  # bound to something that has no hash
        return None


def _roots(module: str) -> Iterator[Path]:
    """The folder of the top package that a module is part of, or of its file where it is alone."""
    top = sys.modules.get(module.split(".")[0])
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.split(".")[0] == "benchmark":
        if file:
            yield Path(file).resolve()  # its helpers are the benchmark's
    elif folders := list(getattr(top, "__path__", ())):
        yield from (Path(folder).resolve() for folder in folders)
    elif file:
        path = Path(file).resolve()
        yield path if path.parent.name in _INSTALLED else path.parent


def _in_libraries(parts: tuple[str, ...]) -> bool:
    return any(part in _INSTALLED for part in parts)


def _standard(file: str) -> bool:
    if file.startswith("<frozen "):
        return True
    path = Path(file)
    return path.is_relative_to(_STANDARD) and not _in_libraries(path.relative_to(_STANDARD).parts)
