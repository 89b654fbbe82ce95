"""Names → classes. Built-ins and third parties enter by the same door: entry points.

A name is looked up in the entry-point group ``unmergebench.<kind>``; names of other distributions
are written ``distribution/name``. ``path/to/file.py:Class`` works wherever a name does, so that a
method under development needs no packaging.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import Generic, TypeVar

from benchmark.api.specs import build, did_you_mean, parse, split_composite
from benchmark.core import sources
from benchmark.core.errors import UsageError

T = TypeVar("T")
_DISTRIBUTION = "unmergebench"
_LOADED = "_unmergebench_"  # begins the name of a module that was loaded by its file
_FILE = re.compile(r"^(?P<path>.+\.py):(?P<cls>\w+)$")


class Registry(Generic[T]):
    """A lazy table of the subclasses of ``base`` that are installed under one entry-point group."""

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self._entries: dict[str, importlib.metadata.EntryPoint] | None = None
        self._loaded: dict[str, type[T]] = {}

    @property
    def entries(self) -> dict[str, importlib.metadata.EntryPoint]:
        """Entry points by public name; read once, nothing imported.

        Raises:
            UsageError: two distributions claim one name.
        """
        if self._entries is None:
            found: dict[str, importlib.metadata.EntryPoint] = {}
            for entry in importlib.metadata.entry_points(group=f"{_DISTRIBUTION}.{self.kind}"):
                owner = entry.dist.name if entry.dist else _DISTRIBUTION
                name = entry.name if owner == _DISTRIBUTION else f"{owner}/{entry.name}"
                if name in found and found[name].value != entry.value:
                    raise UsageError(
                        f"{self.kind}: {name!r} is registered twice, as {found[name].value} and "
                        f"{entry.value}; uninstall one"
                    )
                found[name] = entry
            self._entries = dict(sorted(found.items()))
        return self._entries

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return list(self.entries)

    @functools.cached_property
    def shipped(self) -> frozenset[str]:
        """Names from UnmergeBench's own distribution. Imports nothing."""
        return frozenset(
            name
            for name, entry in self.entries.items()
            if entry.dist is None or entry.dist.name == _DISTRIBUTION
        )

    def ships(self, spec: str) -> bool:
        """Whether all parts of ``spec`` ship with UnmergeBench. Imports nothing."""
        try:
            names = [parse(part)[0] for part in split_composite(spec)]
        except (UsageError, RecursionError, MemoryError):
            return False
        return self.shipped.issuperset(names)

    def source(self, name: str) -> Path | str:
        """The file, or else the module, that holds the class behind ``name``. Imports nothing.

        Raises:
            UsageError: unknown name (with the nearest one).
        """
        if match := _FILE.match(name):
            return Path(match["path"])
        if name not in self.entries:
            raise self._unknown(name)
        return self.entries[name].module

    def fingerprint(self, spec: str) -> str:
        """sha256 over the source of all parts of ``spec``, in order. Raises as :meth:`source`."""
        total = hashlib.sha256()
        for part in split_composite(spec):
            total.update(sources.fingerprint(self.source(parse(part)[0])).encode())
        return total.hexdigest()

    def get(self, name: str) -> type[T]:
        """The class behind ``name`` or ``file.py:Class``.

        Raises:
            UsageError: unknown name (with the nearest one), or a class of another kind.
        """
        if name not in self._loaded:
            if match := _FILE.match(name):
                cls = _from_file(Path(match["path"]), match["cls"])
            elif name in self.entries:
                cls = self.entries[name].load()
            else:
                raise self._unknown(name)
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise UsageError(f"{name} is not a {self.base.__name__} subclass")
            if not hasattr(cls, "__dataclass_fields__"):
                raise UsageError(
                    f"{name} is no dataclass; decorate it with @dataclass(frozen=True)"
                )
            self._loaded[name] = cls
        return self._loaded[name]

    def create(self, spec: str) -> T:
        """An instance from one spec without ``+``."""
        name, arguments = parse(spec)
        return build(self.get(name), name, arguments)

    def _unknown(self, name: str) -> UsageError:
        return UsageError(f"unknown {self.singular} {name!r}{did_you_mean(name, self.names())}")

    @property
    def singular(self) -> str:
        """``defense`` for the group ``defenses``."""
        return self.kind.removesuffix("s")


def file_spec(cls: type) -> str | None:
    """The ``file.py:Class`` by which ``cls`` was loaded; None for one that can be imported."""
    if not cls.__module__.startswith(_LOADED):
        return None
    return f"{sys.modules[cls.__module__].__file__}:{cls.__qualname__}"


def _from_file(path: Path, cls: str) -> type:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    # The name depends on the content: an edited file is loaded afresh, and pickles find the module.
    name = f"{_LOADED}{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UsageError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    found = getattr(sys.modules[name], cls, None)
    if not isinstance(found, type):
        raise UsageError(f"{path} defines no class {cls!r}")
    return found
