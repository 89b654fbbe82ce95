"""Is an entry what it says it is? Its own figures first, then some of its cells run again."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.errors import UnmergeBenchError
from benchmark.evaluation.statistics import unpack_bits
from benchmark.records import Cell
from leaderboard import checks
from leaderboard.entry import Entry

#: How far accuracy may be from the entry's: so many standard errors of a paired difference.
SIGMAS = 3.0


@dataclass
class Verdict:
    """``sound``: nothing is wrong. ``reasons``: what is. ``rerun``: what each cell gave here."""

    entry: str
    sound: bool = True
    reasons: list[str] = field(default_factory=list)
    rerun: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, *reasons: str) -> None:
        self.reasons += reasons
        self.sound = self.sound and not reasons


def verify(
    entry: Entry,
    *,
    rerun: int = 0,
    seed: int = 0,
    trusted: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Check an entry, and run ``rerun`` random cells of it on this machine.

    ``trusted``: specs of defenses whose code may be run though it is not installed here
    (``file.py:Class``): nothing that an entry names is executed unless the user names it too.
    """
    verdict = Verdict(f"{entry.defense.spec} {entry.version}")
    verdict.wrong(*checks.problems(entry))
    _source(entry, verdict, trusted)
    if rerun and verdict.sound:
        if _foreign(entry.defense.spec) and entry.defense.spec not in trusted:
            verdict.wrong(
                f"cells cannot be run again: {entry.defense.spec} is code of its own; "
                f"read it, then name it with --trust '{entry.defense.spec}'"
            )
        else:
            _run_again(entry, rerun, seed, verdict, notify)
    return verdict


def _foreign(spec: str) -> bool:
    """Whether a spec names a Python file or another package's method."""
    return ".py:" in spec or "/" in spec


def _source(entry: Entry, verdict: Verdict, trusted: Sequence[str]) -> None:
    from benchmark import methods
    from benchmark.pipeline.fingerprint import sha
    from benchmark.pipeline.workbench import method_key

    spec = entry.defense.spec
    if _foreign(spec) and spec not in trusted:
        verdict.notes.append(f"the source of {spec} was not looked at")
        return
    try:
        method = methods.defense(spec).method
    except UnmergeBenchError as error:
        verdict.notes.append(f"{spec} is not installed here ({error}); its source was not compared")
        return
    if method.card != entry.defense.card:
        verdict.wrong("its card is not that of the defense installed here")
    if sha(method_key(method)) != entry.defense.source_sha256:
        verdict.notes.append(f"{spec} was edited since: the source here is another one")


def _run_again(
    entry: Entry, count: int, seed: int, verdict: Verdict, notify: Callable[[str], None]
) -> None:
    import torch

    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running

    done = [cell for cell in entry.cells if cell.status in ("ok", "no-benefit")]
    chosen = random.Random(seed).sample(done, min(count, len(done)))
    device = torch.device("cpu")
    plan = planning.make(entry.suite.definition, device)
    testbed = plan.testbed.method.content_hash()
    if testbed != entry.subjects.data:
        verdict.wrong(f"testbed {plan.testbed.spec} here holds other data")
        return
    places = {checks.place(cell): cell for cell in chosen}
    planned = tuple(
        p
        for p in plan.cells
        if (p.group.victim, tuple(p.group.partners), p.seed, p.attack.spec, p.merger.spec) in places
    )
    with tempfile.TemporaryDirectory(prefix="unmergebench-") as folder:
        narrowed = planning.Plan(plan.suite, plan.testbed, planned)
        fresh = running.execute(narrowed, Path(folder) / "run", device, notify=notify)
    for cell in fresh:
        stated = places[checks.place(cell)]
        problems = list(_differences(stated, cell))
        verdict.rerun.append(
            {
                "cell": checks.words(stated),
                "stated": stated.protection,
                "interval": stated.protection_ci,
                "found": cell.protection,
                "same_release": stated.sha256.released == cell.sha256.released,
                "agrees": not problems,
            }
        )
        verdict.wrong(*(f"run again, {checks.words(stated)}: {p}" for p in problems))


def _differences(stated: Cell, found: Cell) -> list[str]:
    if found.status != stated.status:
        return [f"status {found.status} ({found.reason}), stated {stated.status}"]
    problems = []
    for who, outcomes in stated.correct.items():
        for task, text in outcomes.items():
            before, after = unpack_bits(text), unpack_bits(found.correct[who][task])
            if not close(before, after):
                problems.append(
                    f"accuracy of {who} on {task} is {100 * after.mean():.1f} %, "
                    f"stated {100 * before.mean():.1f} %"
                )
    ours, theirs = found.protection_ci, stated.protection_ci
    if ours and theirs and (ours[0] > theirs[1] or ours[1] < theirs[0]):
        problems.append(
            f"protection {found.protection:.2f} ({ours[0]:.2f} to {ours[1]:.2f}), "
            f"stated {stated.protection:.2f} ({theirs[0]:.2f} to {theirs[1]:.2f})"
        )
    return problems


def close(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two accuracies on the same examples differ by no more than chance explains."""
    if len(before) != len(after):
        return False
    gap = after.astype(float) - before
    error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 1.0
    return bool(abs(gap.mean()) <= max(SIGMAS * error, 1 / len(gap)))
