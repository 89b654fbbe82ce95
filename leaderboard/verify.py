"""Is an entry what it says it is? Its own figures first, then some of its cells run again."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.core.errors import UsageError
from benchmark.core.records import Cell
from benchmark.evaluation.statistics import unpack_bits
from benchmark.pipeline.suite import Group, Suite
from leaderboard import checks, folder, trust
from leaderboard.entry import Entry, measured

#: How far accuracy may be from the entry's: so many standard errors of a paired difference.
SIGMAS = 3.0
#: Logits of another machine differ in their last digits; gaps are compared by their magnitude.
GAP_FACTOR = 10.0
GAP_FLOOR = 1e-5


@dataclass
class Verdict:
    """``sound``: nothing is wrong. ``reasons``: what is. ``rerun``: what each cell gave here, of
    those that ``seed`` chose. ``notes``: what was not looked at, and what a reader should know."""

    entry: str
    sound: bool = True
    reasons: list[str] = field(default_factory=list)
    seed: int | None = None
    rerun: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, *reasons: str) -> None:
        self.reasons += reasons
        self.sound = self.sound and not reasons


def verify(
    entry: Entry,
    *,
    path: Path | None = None,
    rerun: int = 0,
    seed: int | None = None,
    trusted: Collection[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Check an entry, and run ``rerun`` random cells of it, certificates included, on this machine.

    ``path``: where it lies; its place and its other versions are checked too. ``seed`` chooses the
    cells; drawn afresh if None, for whoever can foresee the choice can forge the other cells.
    ``trusted``: specs of defenses whose code may be run though it does not ship with UnmergeBench:
    nothing that an entry names is executed unless the user names it too.
    """
    verdict = Verdict(f"{entry.defense.spec} {entry.version}")
    if path is not None:
        verdict.wrong(*folder.misplaced(path, entry))
    verdict.wrong(*checks.problems(entry))
    known = _source(entry, verdict, trusted)
    if entry.invalidated:
        verdict.notes.append(f"it no longer counts: {entry.invalidated}")
    if entry.superseded_by:
        verdict.notes.append(f"superseded by {entry.superseded_by}")
    if rerun and verdict.sound:
        if known:
            verdict.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
            _run_again(entry, rerun, verdict, notify)
        else:
            verdict.wrong("no cell can be run again: its code is not here, or not trusted")
    return verdict


def _source(entry: Entry, verdict: Verdict, trusted: Collection[str]) -> bool:
    """Compare card and source with those of the defense here; whether there is one to run."""
    from benchmark.pipeline.identity import sha
    from benchmark.pipeline.workbench import method_key

    spec = entry.defense.spec
    try:
        named = trust.defense(spec, trusted)
    except trust.Untrusted:
        verdict.notes.append(
            f"{spec} does not ship with UnmergeBench, and its source was not looked at; to run it, "
            f"read it first, then add --trust '{spec}'"
        )
        return False
    except UsageError as error:
        verdict.notes.append(f"{spec} is not to be had here ({error})")
        return False
    if named.spec != spec:
        verdict.wrong(f"{spec} is not the shortest name of {named.spec}")
    if named.method.card != entry.defense.card:
        verdict.wrong("its card is not that of the defense installed here")
    if named.method.card.role != "method":
        verdict.wrong(f"{spec} is a {named.method.card.role}, which has no rank")
    if sha(method_key(named.method)) != entry.defense.source_sha256:
        verdict.notes.append(f"{spec}, or code of this project that it imports, was edited since")
    return True


def _run_again(entry: Entry, count: int, verdict: Verdict, notify: Callable[[str], None]) -> None:
    done = [cell for cell in entry.all_cells if measured(cell)]
    chosen = random.Random(verdict.seed).sample(done, min(count, len(done)))
    data = trust.testbed(entry.suite.definition.testbed).method.content_hash()
    if data != entry.subjects.data:
        verdict.wrong(f"testbed {entry.subjects.testbed} here holds other data")
        return
    # With a certificate's cell the suite differs, so each cell is a run of its own: what they have
    # in common, experts and merges, is in the store.
    for stated in chosen:
        found = _again(entry.suite.definition, stated, notify)
        problems = list(_differences(stated, found))
        verdict.rerun.append(
            {
                "cell": checks.words(stated),
                "stated": stated.protection,
                "interval": stated.protection_ci,
                "found": found.protection,
                "same_release": stated.sha256.released == found.sha256.released,
                "agrees": not problems,
            }
        )
        verdict.wrong(*(f"run again, {checks.words(stated)}: {p}" for p in problems))


def _again(suite: Suite, stated: Cell, notify: Callable[[str], None]) -> Cell:
    import torch

    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running

    # The suite's first merger is where benign use is measured.
    mergers = dict.fromkeys((trust.merger(suite.mergers[0]).spec, stated.merger))
    suite = suite.model_copy(
        update={
            "groups": (Group(victim=stated.victim, partners=tuple(stated.partners)),),
            "seeds": (stated.seed,),
            "attacks": (stated.attack,),
            "mergers": tuple(mergers),
        }
    )
    device = torch.device("cpu")
    plan = planning.make(suite, device)
    cells = tuple(p for p in plan.cells if p.merger.spec == stated.merger)
    with tempfile.TemporaryDirectory(prefix="unmergebench-") as scratch:
        narrowed = planning.Plan(plan.suite, plan.testbed, cells)
        (found,) = running.execute(narrowed, Path(scratch) / "run", device, notify=notify)
    return found


def _differences(stated: Cell, found: Cell) -> Iterator[str]:
    """Where a cell made here contradicts the entry's: by more than chance, or than rounding."""
    if found.status != stated.status:
        yield f"status {found.status} ({found.reason}), stated {stated.status}"
        return
    for who, outcomes in stated.correct.items():
        for task, text in outcomes.items():
            before, after = unpack_bits(text), unpack_bits(found.correct[who][task])
            if len(before) != len(after):
                yield f"{len(after)} test examples of {task}, stated {len(before)}"
            elif not close(before, after):
                yield _accuracies(f"{who} on {task}", after.mean(), before.mean())
    ours, theirs = found.protection_ci, stated.protection_ci
    if ours and theirs and (ours[0] > theirs[1] or ours[1] < theirs[0]):
        yield (
            f"protection {found.protection:.2f} ({ours[0]:.2f} to {ours[1]:.2f}), "
            f"stated {stated.protection:.2f} ({theirs[0]:.2f} to {theirs[1]:.2f})"
        )
    mine, its = _shares(found), _shares(stated)
    if mine.keys() != its.keys():
        yield f"measures {', '.join(sorted(mine.keys() ^ its.keys()))} in one of the two only"
    for name in mine.keys() & its.keys():
        if abs(mine[name] - its[name]) > _allowed(mine[name], found.n_test):
            yield _accuracies(name, mine[name], its[name])
    for name in ("logit_gap", "bf16_gap", "bf16_gap_expert", "recovered_gap"):
        here, there = getattr(found, name), getattr(stated, name)
        if (here is None) != (there is None) or (here is not None and _far(here, there)):
            yield f"{name} is {here}, stated {there}"
    if (found.budget.examples, found.budget.per_class) != (
        stated.budget.examples,
        stated.budget.per_class,
    ):
        yield f"the attack used {found.budget.examples} examples, stated {stated.budget.examples}"
    if _far(found.budget.flops, stated.budget.flops, floor=1.0):
        yield f"the attack took {found.budget.flops:.2g} FLOPs, stated {stated.budget.flops:.2g}"
    if (found.n_val, found.qk_gauge) != (stated.n_val, stated.qk_gauge):
        yield "other validation examples, or another gauge of Q and K, than stated"


def _shares(cell: Cell) -> dict[str, float]:
    """Accuracies that are stated without outcomes."""
    named = {"the release alone": cell.utility, "the recovered model alone": cell.standalone}
    found = {name: value for name, value in named.items() if value is not None}
    found |= {f"the base on {task}": value for task, value in cell.zero_shot.items()}
    for name, shares in cell.fixed.items():
        found |= {f"the merge at coefficient {name} on {t}": v for t, v in shares.items()}
    for use, models in cell.benign.items():
        found |= {f"{who} after {use}": value for who, value in models.items()}
    return found


def _accuracies(what: str, found: float, stated: float) -> str:
    return f"accuracy of {what} is {100 * found:.1f} %, stated {100 * stated:.1f} %"


def _allowed(share: float, n: int) -> float:
    """Two accuracies on the same n examples: unpaired, which errs on the side of trust."""
    return max(SIGMAS * (2 * share * (1 - share) / n) ** 0.5, 2 / n)


def _far(here: float, there: float, floor: float = GAP_FLOOR) -> bool:
    low, high = sorted((max(here, floor), max(there, floor)))
    return high > GAP_FACTOR * low


def close(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two accuracies on the same examples differ by no more than chance explains."""
    if len(before) != len(after):
        return False
    gap = after.astype(float) - before
    error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 1.0
    return bool(abs(gap.mean()) <= max(SIGMAS * error, 1 / len(gap)))
