"""Which defenses passed `check`: what a run writes down, and `submit` asks for.

A mark is no proof. Whoever writes the defense owns the machine that made the mark; who publishes an
entry makes it again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict, cast

from benchmark.api.methods import DEFENSES
from benchmark.core import sources
from benchmark.core.paths import cache, write_text

#: Seconds after which a check that has not ended counts as failed.
LIMIT = 1800
#: What stands for the names of checks where there was no report.
NO_REPORT = "report"


class Mark(TypedDict):
    """Whether one defense passed, as it was when its ``source`` had that sha256.

    ``failed``: names of checks. ``excused``: those that it failed as its class says it would.
    """

    source: str
    passed: bool
    failed: list[str]
    excused: list[str]


def marks(
    specs: Iterable[str], notify: Callable[[str], None] = lambda text: None
) -> dict[str, Mark]:
    """The mark of each defense, by spec.

    Those that ship are held to their contract by the tests of UnmergeBench. Anybody else's is
    checked in a process of its own, once for each source; ``notify`` hears of it.
    """
    return {spec: _mark(spec, notify) for spec in dict.fromkeys(specs)}


def _mark(spec: str, notify: Callable[[str], None]) -> Mark:
    source = DEFENSES.fingerprint(spec)
    if DEFENSES.ships(spec):
        return Mark(source=source, passed=True, failed=[], excused=[])
    kept = _kept(spec, source)
    found = _json(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if found.keys() == Mark.__annotations__.keys():  # else it is damaged, and made again
        return cast(Mark, found)
    notify(f"checking {spec} against its contract")
    mark = _checked(spec, source, notify)
    if mark["failed"] != [NO_REPORT]:  # what killed it may have been the machine's
        write_text(kept, json.dumps(mark, indent=2) + "\n")
    return mark


def _kept(spec: str, source: str) -> Path:
    """Where the mark is remembered: another source, or other checks, have another."""
    key = hashlib.sha256("\0".join((spec, source, _checks())).encode()).hexdigest()
    return cache() / "checks" / f"{key}.json"


@functools.cache
def _checks() -> str:
    """sha256 over the checks and all that they import."""
    return sources.fingerprint("benchmark.conformance")


def _checked(spec: str, source: str, notify: Callable[[str], None]) -> Mark:
    command = [sys.executable, "-m", "benchmark.cli", "check", "defense", spec, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        report, reason = {}, f"it has not ended in {LIMIT} s"
    else:
        # A method may have printed before the report.
        printed = done.stdout[done.stdout.rfind("\n{\n") + 1 :]
        report, reason = _json(printed), done.stderr.strip().rpartition("\n")[2]
    if "checks" not in report:
        notify(f"no report on {spec}: {reason}")
        return Mark(source=source, passed=False, failed=[NO_REPORT], excused=[])
    names = {
        status: [outcome["check"] for outcome in report["checks"] if outcome["status"] == status]
        for status in ("failed", "expected failure")
    }
    return Mark(
        source=source,
        passed=done.returncode == 0 and not names["failed"],
        failed=names["failed"],
        excused=names["expected failure"],
    )


def _json(text: str) -> dict[str, Any]:
    """The object that a text is; an empty one if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
