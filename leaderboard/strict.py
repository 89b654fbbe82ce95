"""JSON from strangers: what ``json`` lets pass and a benchmark must not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from benchmark.core.errors import UnmergeBenchError

MAX_BYTES = 32 * 2**20
MAX_DEPTH = 30
#: Characters of one string; the longest that entries hold are outcomes per example, 4 a character.
MAX_STRING = 20_000
MAX_KEY = 400
#: Magnitude of a number (model FLOPs stay far below).
MAX_NUMBER = 10**30
#: C0 and C1 controls, and what turns the direction of text around or hides in it.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_HALF = re.compile("[\ud800-\udfff]")


class Malformed(UnmergeBenchError):
    """A file that is not what it should be."""


def loads(data: bytes, what: str) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        Malformed: over ``MAX_BYTES``, not UTF-8 or JSON, nested deeper than ``MAX_DEPTH``, a key
            twice in one object, NaN or Infinity, a number over ``MAX_NUMBER``, a long string, an
            invisible character or a lone surrogate in one.
    """

    def refuse(problem: str) -> NoReturn:
        raise Malformed(f"{what}: {problem}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(name for name, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            refuse(f"key {twice[:60]!a} stands twice")
        return found

    def whole(text: str) -> int:
        # The length first: reading an integer takes quadratic time.
        if len(text) > 31 or abs(int(text)) > MAX_NUMBER:
            refuse(f"an integer of {len(text)} digits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if not abs(value) <= MAX_NUMBER:
            refuse(f"{text[:40]} is too large a number")
        return value

    if len(data) > MAX_BYTES:
        refuse(f"over {MAX_BYTES // 2**20} MiB")
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=lambda name: refuse(f"{name} is no JSON"),
            parse_int=whole,
            parse_float=real,
        )
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        refuse(f"no JSON: {error.msg} (line {error.lineno})")
    except RecursionError:
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    if problem := _problem(found):
        refuse(problem)
    return found


def read(path: Path) -> bytes:
    """The bytes of a plain file.

    Raises:
        Malformed: a link, a folder, a device, or over ``MAX_BYTES``.
    """
    if path.is_symlink() or not path.is_file():
        raise Malformed(f"{path} is no plain file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Malformed(f"{path}: over {MAX_BYTES // 2**20} MiB")
    return data


def _problem(found: Any) -> str:
    """What is wrong with parsed JSON: its depth or one of its strings. Without recursion."""
    waiting = [(found, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, str):
            if problem := _of_text(value, MAX_STRING):
                return problem
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                return f"nested deeper than {MAX_DEPTH} levels"
            if isinstance(value, dict):
                for key in value:
                    if problem := _of_text(key, MAX_KEY):
                        return problem
            items = value.values() if isinstance(value, dict) else value
            waiting += [(item, depth + 1) for item in items]
    return ""


def _of_text(text: str, most: int) -> str:
    if len(text) > most:
        return f"a string of {len(text)} characters, at most {most} are read"
    if match := UNSEEN.search(text):
        return f"holds the invisible character U+{ord(match[0]):04X}"
    if _HALF.search(text):
        return "holds half a character (a lone surrogate)"
    return ""
