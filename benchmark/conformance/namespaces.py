"""What a method could replace in the process: functions, classes and constants, each where it is.

Whoever runs in the process can replace any of it, this file too; so a check of it finds what is
replaced carelessly or in passing. Against the rest stands that nobody else's defense makes its
release in the process that evaluates it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import operator
import pkgutil
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

#: All of it is watched, but for the commands and what they print with.
_OURS = ("benchmark", "attacks", "defenses")
_UNWATCHED = ("benchmark.cli", "benchmark.reporting", "benchmark.__main__")
#: What every method and every evaluation computes with.
_LIBRARIES = (
    "builtins", "hashlib", "json", "math", "random", "time",
    "numpy", "numpy.linalg", "numpy.random",
    "torch", "torch.autograd", "torch.func", "torch.linalg", "torch.nn", "torch.nn.functional",
    "torch.nn.modules.module", "torch.optim",
)  # fmt: skip
#: Classes below torch's public ones.
_CLASSES = (("torch", "Tensor"), ("torch", "Generator"), ("torch.optim.optimizer", "Optimizer"))
_MISSING = object()
#: What Python itself adds to a class as it is used.
_ADDED_BY_PYTHON = ("__abstractmethods__", "__annotations__", "__doc__", "__slotnames__")


class Namespaces:
    """Everything above, as it is now. ``modules``: others to watch, with the classes in them."""

    def __init__(self, modules: tuple[str, ...] = ()) -> None:
        _load_ours()
        names = [n for n in sys.modules if n.split(".")[0] in _OURS and _watched(n)]
        self._modules = {n: importlib.import_module(n) for n in (*names, *_LIBRARIES, *modules)}
        self._owners = dict(self._walk())
        self._values = {label: _values(owner) for label, owner in self._owners.items()}

    def _walk(self) -> Iterator[tuple[str, ModuleType | type]]:
        for name, module in self._modules.items():
            yield name, module
            for value in list(vars(module).values()):
                if isinstance(value, type) and str(value.__module__).startswith(name):
                    yield f"{value.__module__}.{value.__qualname__}", value
        for name, attribute in _CLASSES:
            yield f"{name}.{attribute}", getattr(importlib.import_module(name), attribute)

    def changed(self) -> list[str]:
        """Dotted names of what was replaced, edited, removed or put in front since."""
        found = [n for n, module in self._modules.items() if sys.modules.get(n) is not module]
        for label, owner in self._owners.items():
            before, now = self._values[label], _values(owner)
            found += [f"{label}.{name}" for name in _differing(owner, before, now)]
        return found

    def restore(self) -> None:
        """Put everything back."""
        sys.modules.update(self._modules)
        for label, owner in self._owners.items():
            before = self._values[label]
            for name in list(_differing(owner, before, _values(owner))):
                if name not in before:
                    delattr(owner, name)
                    continue
                value, inside = before[name]
                if isinstance(value, FunctionType):
                    value.__code__, value.__defaults__, value.__kwdefaults__ = inside
                elif isinstance(inside, dict):
                    value.clear()
                    value.update(inside)
                elif isinstance(inside, list):
                    value[:] = inside
                if vars(owner).get(name, _MISSING) is not value:
                    setattr(owner, name, value)


def _watched(name: str) -> bool:
    return not any(name == other or name.startswith(f"{other}.") for other in _UNWATCHED)


def _load_ours() -> None:
    """Import what is watched, since what is imported later could come patched."""
    for package in _OURS:
        root = importlib.import_module(package)
        for found in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None):
            if _watched(found.name) and found.name not in sys.modules:
                with contextlib.suppress(ImportError):  # an extra that is not installed
                    importlib.import_module(found.name)


def _values(owner: ModuleType | type) -> dict[str, tuple[Any, Any]]:
    """name → (value, what is inside it) of what nothing honest changes."""
    found = {}
    for name, value in list(vars(owner).items()):
        if name in _ADDED_BY_PYTHON or name.startswith("_abc_"):
            continue
        constant = name.lstrip("_").isupper()
        if isinstance(owner, type) or constant or callable(value) or isinstance(value, ModuleType):
            found[name] = value, _inside(value, constant)
    return found


def _inside(value: Any, constant: bool) -> Any:
    if isinstance(value, FunctionType):
        return value.__code__, value.__defaults__, value.__kwdefaults__
    if constant and type(value) in (dict, list):  # of a subclass, to look may be to build
        return value.copy()
    return None


def _differing(
    owner: ModuleType | type, before: dict[str, tuple[Any, Any]], now: dict[str, tuple[Any, Any]]
) -> Iterator[str]:
    for name, (value, inside) in before.items():
        found, within = now.get(name, (_MISSING, None))
        if _hooked(found, value):
            continue
        if found is not value or not _same(within, inside):
            yield name
    # A class is finished; a module may load more of itself, but nothing that hides a builtin.
    for name in now.keys() - before.keys():
        if isinstance(owner, type):
            if not _hooked(now[name][0], getattr(super(owner, owner), name, None)):
                yield name
        elif hasattr(builtins, name):
            yield name


def _hooked(new: Any, old: Any) -> bool:
    """Whether ``new`` is ``old`` but for wrappers of torch's own, as the steps of optimizers get.

    Either may have one: a class that inherits ``step`` gets its wrapper before or after its parent.
    """
    return new is not old and isinstance(new, FunctionType) and _bare(new) is _bare(old)


def _bare(value: Any) -> Any:
    """What torch's own wrappers are around."""
    while isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        if not str(value.__globals__.get("__name__")).startswith("torch."):
            break
        value = value.__wrapped__
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(operator.is_, one, other))
    return one is other
