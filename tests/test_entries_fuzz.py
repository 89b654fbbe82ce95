"""Ten thousand malformed entries: each is an entry or refused in one line, and nothing else."""

from __future__ import annotations

import copy
import json
import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_entries import small, suite

from benchmark.pipeline import suite as suites
from leaderboard import checks, folder
from leaderboard.entry import Entry
from leaderboard.paths import ENTRIES
from leaderboard.runs import board
from leaderboard.strict import MAX_BYTES, Malformed, loads

#: Of eleven entries each.
EXAMPLES = 910
VALID = small().model_dump(mode="json")
SOURCE = json.dumps(VALID)
seeds = st.integers(0, 2**63)
quick = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

STRINGS = [
    "", "x" * 30_000, "a\x00b", "\x1b[31m", "two\nlines", "\u202egnirts", "\u2066x", "\ufeff", "é",
    "<script>alert(1)</script>", "javascript:alert(1)", "../../etc/passwd", "/dev/zero", "NaN",
    "Infinity", "1", "canary.py:C", "none", "params(", "a+b+", "ties(" + "(" * 150, "0" * 64, "zz",
    "\ud800", "2030-13-45", "-" * 150 + "1", "con", "tiny-0", "tiny-2", "-.-", "mergekit/linear",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 10**29, -(10**29), 1e30, 1e-320, -0.0, 0.5, 2**31, 2**63, 2**64, 7.5, True, False,
]  # fmt: skip
#: Texts that json.dumps never writes, put in place of a value.
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "9" * 31, "1e31", "[" * 200,
    "[" * 100_000, '{"a":' * 5000, '"\\ud800"', '"\\udfff\\ud800"', '{"a":1,"a":2}', "01", "+1",
    "'x'", '"\x01"', "undefined", "/**/1", "", ",", '"unclosed', "1.", ".5", "0x10", "tru",
    "\ufeff",
]  # fmt: skip


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of the small entry ships."""
    monkeypatch.setattr(suites, "builtin", lambda: ["tiny"])
    monkeypatch.setattr(suites, "load", lambda name: suite())


class Tally:
    """What became of the entries."""

    def __init__(self) -> None:
        self.refused = self.unsound = self.sound = 0

    @property
    def all(self) -> int:
        return self.refused + self.unsound + self.sound


def judge(data: bytes, tally: Tally) -> None:
    """An entry, which can then be checked, ranked and written, or one line that says why not."""
    try:
        entry = folder.parse(data, "x.json")
    except Malformed as error:
        text = str(error)
        assert text.startswith("x.json: ")
        assert text.isprintable()
        assert len(text) < 600
        tally.refused += 1
        return
    assert isinstance(entry, Entry)
    problems = checks.problems(entry)
    assert all(isinstance(problem, str) for problem in problems)
    if problems:
        tally.unsound += 1
        # The page shows what can be read: aggregation must not stumble over it.
        board(entry.cells, lambda spec: entry.defense.card)
    else:
        tally.sound += 1
    assert ".." not in folder.path_of(ENTRIES, entry).parts


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in parsed JSON."""
    found = []
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, (dict, list)):
            keys = list(here) if isinstance(here, dict) else range(len(here))
            found += [(here, key) for key in keys]
            waiting += [here[key] for key in keys]
    return found


def value(rng: random.Random) -> Any:
    """A value of any type."""
    kinds: list[Any] = [
        lambda: None, lambda: rng.choice(STRINGS), lambda: rng.choice(NUMBERS), list, dict,
        lambda: [rng.choice(NUMBERS)], lambda: {rng.choice(STRINGS): rng.choice(NUMBERS)},
        lambda: rng.random(), lambda: rng.randrange(-5, 50),
    ]  # fmt: skip
    return rng.choice(kinds)()


def mutated(rng: random.Random) -> bytes:
    """A valid entry with one to three changes of structure."""
    data = json.loads(SOURCE)
    marks: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # First which part of an entry, or nearly all changes would fall on cells.
        top = rng.choice(list(data)) if data else ""
        found = places(data.get(top)) if rng.random() < 0.9 else []
        container, key = rng.choice(found) if found else (data, top)
        change = rng.randrange(7)
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        if change == 0:
            del container[key]
        elif change == 1:
            container[key] = value(rng)
        elif change == 2:
            mark = f"@{len(marks)}@"
            container[key], marks[mark] = mark, rng.choice(RAW)
        elif change == 3 and isinstance(container, dict):
            container[rng.choice([*STRINGS, "extra"])] = value(rng)
        elif change == 4 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif change == 5 and isinstance(container, dict):
            container[rng.choice(list(container))] = copy.deepcopy(container[key])
        elif isinstance(container[key], (int, float)):
            container[key] = rng.choice((-1, 2, 0.5, 1e6)) * container[key]
        else:
            other, name = rng.choice(places(data))
            container[key] = copy.deepcopy(other[name])
    text = json.dumps(data)
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def plausible(rng: random.Random) -> bytes:
    """A valid entry with other values of the same types in its cells and marks."""
    data = json.loads(SOURCE)
    found = [p for part in ("cells", "cells", "subjects", "flags") for p in places(data[part])]
    found += [(data, "superseded_by"), (data, "invalidated"), (data, "credit")]
    for container, key in rng.choices(found, k=rng.randrange(1, 4)):
        old = container[key]
        if isinstance(old, bool):
            container[key] = not old
        elif isinstance(old, (int, float)):
            container[key] = rng.choice([old + 1, -old, old * 1.01, 0, 1, 10**29])
        elif isinstance(old, str):
            same = [c[k] for c, k in found if isinstance(c[k], str) and len(c[k]) == len(old)]
            container[key] = rng.choice([*same, "none", "slerp", "canary.py:C"])
    return json.dumps(data).encode()


def damaged(rng: random.Random) -> bytes:
    """The bytes of a valid entry, cut, doubled, overwritten or made other than UTF-8."""
    data = bytearray(SOURCE.encode())
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.randrange(1, 40))
        how = rng.randrange(5)
        if how == 0:
            del data[start:stop]
        elif how == 1:
            data[start:start] = data[start:stop]
        elif how == 2:
            data[start] = rng.randrange(256)
        elif how == 3:
            data[start:stop] = rng.choice(RAW).encode("utf-8", "surrogatepass")[:2000]
        else:
            del data[start:]
        if not data:
            break
    encoding = rng.choice(["", "", "", "utf-16", "utf-32"])
    return data.decode("latin-1").encode(encoding) if encoding else bytes(data)


def test_a_valid_entry_is_one() -> None:
    tally = Tally()
    judge(SOURCE.encode(), tally)
    assert tally.sound == 1


@pytest.mark.slow
def test_ten_thousand_malformed_entries() -> None:
    tally = Tally()

    @quick
    @given(seeds)
    def fuzz(seed: int) -> None:
        rng = random.Random(seed)
        for change in (*[mutated] * 6, plausible, *[damaged] * 4):
            judge(change(rng), tally)

    fuzz()
    assert tally.all >= 10_000
    # Both doors are gone through, or the changes would be too coarse or too fine.
    assert tally.refused > 2000
    assert tally.unsound > 300


@pytest.mark.parametrize("raw", RAW)
def test_json_that_is_none(raw: str) -> None:
    data = f'{{"schema_version": {raw}}}'.encode("utf-8", "surrogatepass")
    with pytest.raises(Malformed, match=r"^x: \S[^\n]*$"):
        folder.parse(data, "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":1,"a":1}', "key 'a' stands twice"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[1e999]", "too large a number"),
        (b"[" + b"7" * 32 + b"]", "an integer of 32 digits"),
        (b"[" * 31 + b"]" * 31, "deeper than 30"),
        (b"[" * 200_000, "deeper than 30"),
        (b'"\\ud800"', "lone surrogate"),
        ('"\u202e"'.encode(), r"U\+202E"),
        ('{"\u200b": 1}'.encode(), r"U\+200B"),
        (b'"' + b"x" * 20_001 + b'"', "a string of 20001"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "no JSON"),
        (b" " * (MAX_BYTES + 1), "over 32 MiB"),
    ],
)
def test_each_limit_has_its_own_words(data: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        loads(data, "x")


def test_text_is_no_number() -> None:
    """Lax validation would read "nan" as a number, which every comparison lets pass."""
    for text in ("nan", "inf", "0.5"):
        data = json.loads(SOURCE)
        data["cells"][0]["protection"] = text
        with pytest.raises(Malformed, match=r"cells\.0\.protection"):
            folder.parse(json.dumps(data).encode(), "x")


def test_a_suite_of_a_billion_cells_is_refused_at_once() -> None:
    data = json.loads(SOURCE)
    definition = data["suite"]["definition"]
    for field in ("attacks", "mergers"):
        definition[field] = [f"none{i}" for i in range(1000)]
    definition["seeds"] = list(range(1000))
    data["suite"]["hash"] = suites.Suite.model_validate(definition).hash
    start = time.perf_counter()
    with pytest.raises(Malformed, match="asks for more than 100000 cells"):
        folder.parse(json.dumps(data).encode(), "x")
    assert time.perf_counter() - start < 5


def test_huge_notes_are_refused() -> None:
    data = json.loads(SOURCE)
    data["cells"][0]["notes"] = {str(i): "x" * 1000 for i in range(100)}
    with pytest.raises(Malformed, match="notes holds over"):
        folder.parse(json.dumps(data).encode(), "x")
