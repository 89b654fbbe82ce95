"""JSON from strangers: what ``json`` lets pass and a benchmark must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from benchmark.errors import UnmergeBenchError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 30
MAX_DIGITS = 30


class Malformed(UnmergeBenchError):
    """A file that is not what it should be."""


def loads(data: bytes, what: str) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        Malformed: over ``MAX_BYTES``, not UTF-8 or JSON, nested deeper than ``MAX_DEPTH``, a key
            twice in one object, NaN or Infinity, a number that overflows, an integer of more than
            ``MAX_DIGITS`` digits, a lone surrogate.
    """

    def refuse(problem: str) -> NoReturn:
        raise Malformed(f"{what}: {problem}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            refuse(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
        return found

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            refuse(f"an integer of {len(text)} digits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            refuse(f"{text} is too large for a number")
        return value

    if len(data) > MAX_BYTES:
        refuse(f"{len(data) / 2**20:.0f} MiB, at most {MAX_BYTES // 2**20} are read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 (byte {error.start})")
    if _depth(text) > MAX_DEPTH:
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    try:
        found = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=lambda name: refuse(f"{name} is no JSON"),
            parse_int=whole,
            parse_float=real,
        )
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        refuse(f"no JSON: {error.msg} (line {error.lineno})")
    except UnicodeEncodeError:
        refuse("holds half a character (a lone surrogate)")
    return found


def read(path: Path) -> Any:
    """The same from a file, which must be a plain one.

    Raises:
        Malformed: as :func:`loads`; also a link, a folder, a device.
    """
    if path.is_symlink() or not path.is_file():
        raise Malformed(f"{path} is no plain file")
    if path.stat().st_size > MAX_BYTES:
        raise Malformed(f"{path}: over {MAX_BYTES // 2**20} MiB")
    return loads(path.read_bytes(), str(path))


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, without recursion."""
    depth = deepest = 0
    inside = escaped = False
    for character in text:
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
