"""The state of the process that a method must leave alone: what it is, and how it is put back."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
#: Events of sys.audit that reach outside the process. Importing reads files, so reading is allowed.
_OUTSIDE = ("socket.connect", "subprocess.Popen", "os.system", "os.remove", "os.rename", "os.mkdir")

_watchers: list[list[str]] = []
_hooked = False


def random_states() -> dict[str, Any]:
    """The global random state by library, in a form that compares."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


def reseed(seed: int) -> None:
    """Seed every global generator."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def settings() -> dict[str, Any]:
    """Settings of the process that change what other code computes, by name."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def running() -> dict[str, Any]:
    """What goes on after a call returns, or comes between the lines of other code, by name."""
    return {
        "threads": threading.enumerate(),
        "timers": [signal.getitimer(which)[0] > 0 for which in _TIMERS],
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks of the garbage collector": list(gc.callbacks),
        "trace and profile functions": [sys.gettrace(), sys.getprofile()],
        "import hooks": [*sys.meta_path, *sys.path_hooks],
        "torch modes": [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()],
        "hooks of all modules": [
            id(hook)
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and hasattr(hooks, "values")
            for hook in hooks.values()
        ],
    }


@contextmanager
def restored() -> Iterator[None]:
    """Put random states and settings back on the way out, whatever ran meanwhile."""
    before = settings()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for name, value in settings().items():
            if value != before[name]:
                _SETTINGS[name][1](before[name])
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextmanager
def outside() -> Iterator[list[str]]:
    """Collects what the block writes, deletes, connects to or starts."""
    global _hooked
    if not _hooked:  # a hook can never be removed, so there is one, and it is idle elsewhere
        sys.addaudithook(_audit)
        _hooked = True
    seen: list[str] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    told = ""
    if event == "open":
        path, _, flags = arguments
        written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if isinstance(flags, int) and flags & written and "__pycache__" not in str(path):
            told = f"opens {path} for writing"
    elif event in _OUTSIDE:
        told = f"{event} {arguments[0] if arguments else ''}".strip()
    if told:
        for seen in _watchers:
            seen.append(told)


def _set_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "gradients (torch.set_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled),
    "CPU threads (torch.set_num_threads)": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "environment variables": (lambda: dict(os.environ), _set_environment),
    "current folder": (os.getcwd, os.chdir),
}
