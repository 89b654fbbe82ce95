"""Is an entry what it says it is? Its own figures first, then what it shares with the other entries
of its suite, then some of its cells run again."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from benchmark.api import methods
from benchmark.core.errors import UsageError
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from leaderboard import checks, folder, shared, trust
from leaderboard.differences import Pair, differences, may_differ, together
from leaderboard.entry import Entry
from leaderboard.rerun import Count, again, choose, empty_store
from leaderboard.shared import Dispute

State = Literal["sound", "unsound", "not-checked"]


@dataclass
class Verdict:
    """``reasons``: what is wrong. ``unchecked``: what would have to be known before anybody may
    call the entry sound. ``rerun``: what each cell gave here, of those that ``seed`` chose.
    ``notes``: what was not looked at, and what a reader should know."""

    entry: str
    reasons: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    seed: int | None = None
    rerun: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        """``sound`` only if nothing is wrong and nothing is open."""
        if self.reasons:
            return "unsound"
        return "not-checked" if self.unchecked else "sound"

    @property
    def sound(self) -> bool:
        """Whether the state is ``sound``."""
        return self.state == "sound"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"entry": self.entry, "verdict": self.state, **vars(self)}


def verify(
    entry: Entry,
    *,
    path: Path | None = None,
    entries: Path | None = None,
    rerun: Count = 0,
    seed: int | None = None,
    trusted: Collection[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Check an entry, and run ``rerun`` random cells of it, certificates included, on this machine.

    ``path``: where it lies; its place and its other versions are checked too. ``entries``: the
    folder whose entries it is compared with, that around ``path`` by default. ``seed`` chooses the
    cells; drawn afresh if None, for whoever can foresee the choice can forge the other cells.
    ``trusted``: specs of defenses whose code may be run though it does not ship with UnmergeBench:
    nothing that an entry names is executed unless the user names it too.
    """
    verdict = Verdict(shared.name(entry))
    if path is not None:
        verdict.reasons += folder.misplaced(path, entry)
        if entries is None and not verdict.reasons:
            entries = path.absolute().parent.parent
    verdict.reasons += checks.problems(entry)
    known = _source(entry, verdict, trusted, bool(rerun))
    if entry.invalidated:
        verdict.notes.append(f"it no longer counts: {entry.invalidated}")
    if entry.superseded_by:
        verdict.notes.append(f"superseded by {entry.superseded_by}")
    if verdict.reasons:
        return verdict
    verdict.notes.append("not checked: seconds and the course of searches, its submitter's word")
    open_ = _compared(entry, entries, verdict) if entry.stands else []
    if not rerun:
        verdict.unchecked += [
            f"{dispute}; one of the two is wrong, and --rerun 1 tells which" for dispute in open_
        ]
        verdict.notes.append(
            "no cell was run again: outcomes may be invented; --rerun N runs N cells from nothing"
        )
    elif known:
        verdict.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        _run_again(entry, rerun, open_, verdict, notify)
    return verdict


def _source(entry: Entry, verdict: Verdict, trusted: Collection[str], rerun: bool) -> bool:
    """Compare card and source with those of the defense here; whether there is one to run."""
    spec = entry.defense.spec
    try:
        named = trust.defense(spec, trusted)
    except trust.Untrusted:
        verdict.unchecked.append(
            f"{spec} does not ship with UnmergeBench, and its code was neither looked at nor run; "
            f"read it first, then add --trust '{spec}'"
        )
        return False
    except UsageError as error:
        verdict.unchecked.append(f"{spec} is not to be had here ({error})")
        return False
    if named.spec != spec:
        verdict.reasons.append(f"{spec} is not the shortest name of {named.spec}")
    if named.method.card != entry.defense.card:
        verdict.reasons.append("its card is not that of the defense installed here")
    if named.method.card.role != "method":
        verdict.reasons.append(f"{spec} is a {named.method.card.role}, which has no rank")
    foreign = named.method.changes_modules
    if any(cell.changes_modules != foreign for cell in entry.all_cells if measured(cell)):
        verdict.reasons.append("states another track than that of its defense (changes_modules)")
    if methods.DEFENSES.fingerprint(spec) != entry.defense.source_sha256:
        edited = f"{spec} was made by other code than is here under that name"
        if rerun:
            verdict.notes.append(edited)
        else:
            verdict.unchecked.append(f"{edited}; --rerun N compares what the two do")
    return True


def _compared(entry: Entry, entries: Path | None, verdict: Verdict) -> list[Dispute]:
    """Contradictions with the other entries of the suite; notes if there are none to ask."""
    others = shared.beside(entry, entries) if entries else []
    if not others:
        verdict.notes.append("nothing to compare with: no other entry of its suite stands here")
    return shared.disputes(entry, others)


def _run_again(
    entry: Entry,
    count: Count,
    open_: Sequence[Dispute],
    verdict: Verdict,
    notify: Callable[[str], None],
) -> None:
    with empty_store() as scratch:
        data = trust.testbed(entry.suite.definition.testbed).method.content_hash()
        if data != entry.subjects.data:
            verdict.reasons.append(f"testbed {entry.subjects.testbed} here holds other data")
            return
        assert verdict.seed is not None
        disputed = {where for dispute in open_ for where in dispute.places}
        # With a certificate's cell the suite differs, so each cell is a run of its own: what they
        # have in common, experts and merges, is made once in the store that was empty.
        pairs = [
            (stated, again(entry.suite.definition, stated, scratch, notify))
            for stated in choose(entry, count, verdict.seed, disputed)
        ]
    judge(pairs, open_, verdict)


def judge(pairs: Sequence[Pair], open_: Sequence[Dispute], verdict: Verdict) -> None:
    """Add what cells that were run again say, also of the entries that it contradicts."""
    agreed = set()
    for stated, found in pairs:
        problems = list(differences(stated, found))
        verdict.rerun.append(_line(stated, found, agrees=not problems))
        verdict.reasons += [f"run again, {checks.words(stated)}: {p}" for p in problems]
        if not problems:
            agreed.add(checks.place(stated))
    verdict.reasons += [f"run again, {len(pairs)} cells: {p}" for p in together(pairs)]
    for dispute in open_:
        if agreed & set(dispute.places):
            verdict.notes.append(f"{dispute}; run again, it is {dispute.other} that is wrong")
        else:
            verdict.unchecked.append(f"{dispute}; no cell of these was run again and agreed")


def _line(stated: Cell, found: Cell, *, agrees: bool) -> dict[str, Any]:
    return {
        "cell": checks.words(stated),
        "stated": stated.protection,
        "interval": stated.protection_ci,
        "found": found.protection,
        "may_differ": _finite(may_differ(found)) if measured(found) else None,
        "same_release": stated.sha256.released == found.sha256.released,
        "agrees": agrees,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if isfinite(value) else None
