"""Source code that has no version of its own, found by reading: nothing is imported.

What a method computes depends on its file and on all that it imports. Of that, installed packages
and the standard library are known by their versions; the rest only by its text. So the closure of a
module holds, transitively,

* what lies in its own top-level package, or (of a single file) beside it and below its folder;
* what ships with UnmergeBench;
* whatever else is on the path but not installed: an editable checkout, a folder of one's own.

Imports inside functions, under ``if`` and by ``import_module("name")`` count. A name computed when
the program runs, and data files, are beyond reading.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmark.core.errors import UsageError

OURS = frozenset({"attacks", "benchmark", "defenses", "leaderboard"})


def closure(start: Path | str) -> dict[str, bytes]:
    """The files that ``start``, a file or a dotted module name, depends on.

    Names are relative to the folder that an import begins at (``./`` before those beside a file),
    so that where something is installed does not matter. An edited file is read again.

    Raises:
        UsageError: there is no such file or module, or it has no file (a built-in one).
    """
    return dict(_current(start).sources)


def fingerprint(start: Path | str) -> str:
    """sha256 over the names and bytes of :func:`closure`. Raises as it does."""
    return _current(start).sha256


class _Closure(NamedTuple):
    sources: dict[str, bytes]
    stamps: dict[str, tuple[int, int]]
    sha256: str


#: Closures by where they start, each good as long as none of its files changes.
_known: dict[Path | str, _Closure] = {}


def _current(start: Path | str) -> _Closure:
    """The closure as its files are now; walked and hashed again only if one of them changed."""
    if isinstance(start, Path):
        if not start.is_file():
            raise UsageError(f"no such file: {start}")
        start = start.resolve()
    known = _known.get(start)
    if known is None or any(_stamp(path) != stamp for path, stamp in known.stamps.items()):
        walk = _Walk(start)
        total = hashlib.sha256()
        for name, content in sorted(walk.sources.items()):
            total.update(f"{name}\0{len(content)}\0".encode() + content)
        stamps = {path: _stamp(path) for path in walk.paths}
        known = _known[start] = _Closure(walk.sources, stamps, total.hexdigest())
    return known


class _Import(NamedTuple):
    """``from ..module import name``: ``level`` counts the dots; no name for ``import module``."""

    level: int
    module: str
    name: str = ""


@dataclass(frozen=True)
class _Root:
    """A folder that imports begin at; ``label`` stands before the names of what lies below it."""

    folder: Path
    label: str = ""

    def name(self, path: Path) -> str:
        return self.label + Path(os.path.relpath(path, self.folder)).as_posix()


class _Walk:
    """``sources`` by name, and ``paths``: the files they were read from."""

    def __init__(self, start: Path | str) -> None:
        self.sources: dict[str, bytes] = {}
        self.paths: dict[str, None] = {}
        self._own = ""
        self._beside: _Root | None = None
        self._tops: dict[str, tuple[_Root, ...]] = {}
        waiting = self._starts(start)
        if not waiting:
            raise UsageError(f"no source of {start} is found; is it installed, or beside you?")
        while waiting:
            path, root = waiting.pop()
            if str(path) not in self.paths:
                self.paths[str(path)] = None
                read = _read(str(path), *_stamp(str(path)))
                self.sources[root.name(path)] = read.content
                for one in read.imports:
                    waiting += self._imported(one, path, root)

    def _starts(self, start: Path | str) -> list[tuple[Path, _Root]]:
        if isinstance(start, str):
            self._own = start.partition(".")[0]
            file = _file_of(self._own)
            if file is None or file.name == "__init__.py" or _installed(file):
                return [
                    (path, root)
                    for root in self._roots(self._own)
                    for path in _files(root.folder, start.split("."))
                ]
            start = file.resolve()  # a module in no package
        root = _Root(start.parent, "./")
        self._beside = None if _installed(start) else root
        return [(start, root)]

    def _imported(self, one: _Import, path: Path, root: _Root) -> Iterator[tuple[Path, _Root]]:
        parts = one.module.split(".") if one.module else []
        if one.level:
            folder = path.parent
            for _ in range(one.level - 1):
                folder = folder.parent
            bases = [(folder, root)]
            if init := _with_suffix(folder / "__init__"):
                yield init, root
        else:
            places = self._roots(parts[0])
            if self._beside is not None and parts[0] not in OURS:
                places = (self._beside, *places)
            bases = [(place.folder, place) for place in places]
        for base, found in bases:
            yield from ((file, found) for file in _files(base, parts))
            if one.name == "*":  # also the submodules that ``__all__`` names
                package = base.joinpath(*parts)
                yield from ((file, found) for file in sorted(package.glob("*.py")))
            elif one.name:  # a submodule, or something inside the module
                yield from ((file, found) for file in _files(base, [*parts, one.name]))

    def _roots(self, top: str) -> tuple[_Root, ...]:
        """The folders where the top-level name is found, if its text is what it is known by."""
        if top not in self._tops:
            self._tops[top] = tuple(_Root(folder) for folder in self._folders(top))
        return self._tops[top]

    def _folders(self, top: str) -> list[Path]:
        ours = top == self._own or top in OURS
        if top in sys.stdlib_module_names and not ours:
            return []
        spec = _spec(top)
        if spec is None:
            return []
        found = [Path(place) for place in spec.submodule_search_locations or ()]
        if not found and spec.origin and spec.has_location:
            found = [Path(spec.origin)]
        return [path.parent for path in found if ours or not _installed(path)]


def _spec(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return None


def _file_of(top: str) -> Path | None:
    """The file of a top-level module that is no namespace; of ``__main__`` the script's."""
    spec = _spec(top)
    if spec is not None and spec.has_location and spec.origin:
        return Path(spec.origin)
    script = getattr(sys.modules.get(top), "__file__", None)
    return Path(script) if script else None


def _installed(path: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def _files(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files that importing a dotted name from ``folder`` runs, as far as they exist.

    As Python has it: a package before a module of that name, a folder without ``__init__`` last.
    """
    for part in parts:
        if init := _with_suffix(folder / part / "__init__"):
            yield init
        elif module := _with_suffix(folder / part):
            yield module
            return
        folder = folder / part


def _with_suffix(stem: Path) -> Path | None:
    """The module's file: source, an extension, or byte code."""
    for suffix in importlib.machinery.all_suffixes():
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            return path
    return None


def _stamp(path: str) -> tuple[int, int]:
    """When the file was changed, and its size; zeros if it is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


class _Read(NamedTuple):
    content: bytes
    imports: tuple[_Import, ...]


@functools.lru_cache(maxsize=1 << 12)
def _read(path: str, changed: int, size: int) -> _Read:
    content = Path(path).read_bytes()
    if not path.endswith(".py"):
        return _Read(content, ())
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # whoever imports it will hear of it
        return _Read(content, ())
    return _Read(content, tuple(dict.fromkeys(one for node in ast.walk(tree) for one in _of(node))))


def _of(node: ast.AST) -> Iterator[_Import]:
    """The imports that one node of a syntax tree makes."""
    match node:
        case ast.Import():
            yield from (_Import(0, alias.name) for alias in node.names)
        case ast.ImportFrom():
            yield from (_Import(node.level, node.module or "", a.name) for a in node.names)
        case ast.Call(
            func=ast.Name(id=called) | ast.Attribute(attr=called),
            args=[ast.Constant(value=str(name)), *_],
        ) if called in ("import_module", "__import__"):
            module = name.lstrip(".")
            if name:
                yield _Import(len(name) - len(module), module)
