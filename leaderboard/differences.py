"""What a cell that was run again says about the one that an entry states.

Honest machines differ within :mod:`leaderboard.noise`, both ways: an entry that says too little of
its defense (a rival's, say) lies as well. Where validation ties, another machine may pick another
candidate, and then other outcomes follow. That is granted to few cells (``TIES``), and only so far
as the two candidates are worth the same to the free-rider (``WORTH``); everything else in such a
cell must agree. Of 144 honest cells none did.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil

from benchmark.core.records import Cell
from benchmark.evaluation.scoring import Gains, units
from benchmark.evaluation.soundness import measured
from leaderboard import noise
from leaderboard.noise import Leaning, difference, flips

#: A cell as stated, and as it came out here.
Pair = tuple[Cell, Cell]

#: Share of cells in which validation may have picked another candidate; one is always granted.
TIES = Fraction(1, 10)
#: In units of G: so much may the candidates be apart that validation could not tell apart.
WORTH = 0.02
#: Logits of another machine differ in their last digits; gaps are compared by their magnitude.
GAP_FACTOR = 10.0
GAP_FLOOR = 1e-5
#: Share of itself by which a measure of samples may differ, and as much again.
QUALITY = 0.05
#: FLOPs are counted, not timed, but kernels count attention each in their own way (7 % apart).
FLOPS_FACTOR = 1.5

#: Group of outcomes → whether being right more often helps (1) or hurts (−1) the defense's figures.
FAVOURS = {"attacked": -1, "undefended": 1, "outside": 1, "reference": 1, "released": 1}
#: Flags that only weights or the defense's own words raise; the others follow from figures.
_UNSEEN_FLAGS = {"norm-blow-up", "partly-covered"}
#: Facts that no machine changes.
_FIXED = (
    "access", "task_id", "one_coefficient", "changes_modules", "qk_gauge", "n_val", "n_test",
    "duties", "draws",
)  # fmt: skip


def differences(stated: Cell, found: Cell) -> Iterator[str]:
    """Where a cell made here contradicts the entry's by more than honest machines do."""
    if not measured(found):
        yield f"status {found.status} ({found.reason}), stated {stated.status}"
        return
    yield from _facts(stated, found)
    yield from _outcomes(stated, found)
    yield from _protection(stated, found)
    yield from _shares(stated, found)
    yield from _gaps(stated, found)
    yield from _quality(stated, found)
    if not _other_winner(stated, found):
        yield from _budget(stated, found)


def together(pairs: Sequence[Pair]) -> Iterator[str]:
    """What no single cell shows: a lean in all of them, and too many ties."""
    pairs = [(stated, found) for stated, found in pairs if measured(found)]
    for group, leaning in _leaning(pairs).items():
        if problem := leaning.problem:
            yield f"outcomes of {group} {problem}"
    tied = [pair for pair in pairs if _tied(*pair)]
    granted = max(1, ceil(TIES * len(pairs)))
    if len(tied) > granted:
        yield f"the free-rider chose otherwise in {len(tied)} of {len(pairs)} cells, {granted} may"


def _leaning(pairs: Sequence[Pair]) -> dict[str, Leaning]:
    """By group, and of all that help the defense's figures together."""
    found: dict[str, Leaning] = defaultdict(Leaning)
    for one, other in pairs:
        tied = _tied(one, other)
        for group, outcomes in one.correct.items():
            if group in tied:
                continue
            for task, text in outcomes.items():
                found[group].add(task, text, other.correct[group][task])
                if sign := FAVOURS.get(group):
                    found["all kinds together"].add(task, text, other.correct[group][task], sign)
    return found


def _facts(stated: Cell, found: Cell) -> Iterator[str]:
    for name in _FIXED:
        if getattr(found, name) != getattr(stated, name):
            yield f"{name} is {getattr(found, name)}, stated {getattr(stated, name)}"
    for flag in sorted(_UNSEEN_FLAGS):
        if (flag in found.flags) != (flag in stated.flags):
            yield f"flag {flag} is {'not ' * (flag not in found.flags)}raised here"
    for one, other in (("released", "expert"), ("recovered", "released")):
        mine, its = (
            getattr(cell.sha256, one) == getattr(cell.sha256, other) for cell in (found, stated)
        )
        if mine != its:
            yield f"{one} and {other} are {'one model' if mine else 'two models'} here"


def _outcomes(stated: Cell, found: Cell) -> Iterator[str]:
    tied = _tied(stated, found)
    for group, outcomes in stated.correct.items():
        leaning = Leaning()
        for task, text in outcomes.items():
            here = found.correct[group][task]
            gap = difference(text, here)
            if not gap.size:
                yield f"another number of test examples of {task}"
                continue
            leaning.add(task, text, here)
            differ = 0 if text == here else int(abs(gap).sum())
            if group not in tied and differ > flips(len(gap)):
                yield (
                    f"{differ} of {len(gap)} outcomes of {group} on {task} differ, "
                    f"{flips(len(gap))} may ({_percent(-gap.sum(), len(gap))} found)"
                )
        if group in tied:
            mine, its = tied[group]
            if abs(mine - its) > WORTH:
                yield f"G({group}) is {mine:.3f}, stated {its:.3f}, with another choice"
        elif problem := leaning.problem:
            yield f"outcomes of {group} {problem}"


def _quality(stated: Cell, found: Cell) -> Iterator[str]:
    """Distances and shares over the same samples, which move a little with their last digits."""
    tied = _tied(stated, found)
    for who, measures in found.quality.items():
        for name, value in measures.items() if who not in tied else ():
            said = stated.quality.get(who, {}).get(name, math.nan)
            if not abs(value - said) <= QUALITY * (1 + abs(value)):
                yield f"{name} of {who} is {value:.3g}, stated {said:.3g}"


def _protection(stated: Cell, found: Cell) -> Iterator[str]:
    """What the outcomes come to, where the same candidates were chosen and the same rule applies:
    a release that leaves just no benefit has protection 0, and one that leaves a little has not."""
    here, there = Gains.of(found), Gains.of(stated)
    if here is None or there is None or _tied(stated, found) or here.emptied != there.emptied:
        return
    if found.protection is None or stated.protection is None:
        return
    may = may_differ(found)
    if abs(found.protection - stated.protection) > may:
        yield (
            f"protection is {found.protection:.3f}, stated {stated.protection:.3f}, "
            f"which may be {may:.3f} apart"
        )


def may_differ(found: Cell) -> float:
    """By how much protection may differ from that of a measured cell made here."""
    gains = Gains.of(found)
    assert gains is not None
    unit = units(found.expert_accuracy, secrets=bool(found.duties))
    return noise.protection(gains, list(unit.values()), found.n_test)


def _percent(net: int, n: int) -> str:
    return f"{100 * net / n:+.1f} points"


def _tied(stated: Cell, found: Cell) -> dict[str, tuple[float, float]]:
    """Groups in which another candidate was chosen here → G found and stated."""
    tied = {}
    if _choice(stated) != _choice(found):
        tied["attacked"] = (found.gain or 0.0, stated.gain or 0.0)
    stopped = stated.ensemble.get("stopped") != found.ensemble.get("stopped")
    if stopped or stated.outside_choice != found.outside_choice:
        tied["outside"] = (found.gain_outside or 0.0, stated.gain_outside or 0.0)
    if stopped:  # an ensemble that stops at once buys nothing, for the reference either
        tied["reference"] = (found.gain_reference or 0.0, stated.gain_reference or 0.0)
    return tied


def _choice(cell: Cell) -> tuple[object, ...]:
    return cell.choice, cell.setting, cell.ensemble.get("winner")


def _other_winner(stated: Cell, found: Cell) -> bool:
    """Whether validation picked another attack of an ensemble: another budget, another model."""
    return stated.ensemble.get("winner") != found.ensemble.get("winner")


def _shares(stated: Cell, found: Cell) -> Iterator[str]:
    """Accuracies that are stated without outcomes."""
    mine, its = _accuracies(found), _accuracies(stated)
    if mine.keys() != its.keys():
        yield f"measures {', '.join(sorted(mine.keys() ^ its.keys()))} in one of the two only"
    if _other_winner(stated, found):
        mine.pop("the recovered model alone", None)
    for name in mine.keys() & its.keys():
        if round(abs(mine[name] - its[name]) * found.n_test) > flips(found.n_test):
            yield f"{name} is right on {100 * mine[name]:.1f} %, stated {100 * its[name]:.1f} %"


def _accuracies(cell: Cell) -> dict[str, float]:
    named = {
        "the recovered model alone": cell.standalone,
        "the release on what attackers get": cell.seen,
    }
    found = {name: value for name, value in named.items() if value is not None}
    for name, shares in cell.fixed.items():
        found |= {f"the merge at coefficient {name} on {t}": v for t, v in shares.items()}
    for use, models in cell.benign.items():
        found |= {f"{who} after {use}": value for who, value in models.items()}
    return found


def _gaps(stated: Cell, found: Cell) -> Iterator[str]:
    names = ["logit_gap", "bf16_gap", "bf16_gap_expert"]
    if not _other_winner(stated, found):
        names.append("recovered_gap")
    for name in names:
        here, there = getattr(found, name), getattr(stated, name)
        if (here is None) != (there is None) or (here is not None and _far(here, there)):
            yield f"{name} is {here}, stated {there}"


def _far(here: float, there: float) -> bool:
    low, high = sorted((max(here, GAP_FLOOR), max(there, GAP_FLOOR)))
    return high > GAP_FACTOR * low


def _budget(stated: Cell, found: Cell) -> Iterator[str]:
    here, there = found.budget, stated.budget
    for name in ("examples", "per_class", "steps"):
        if (mine := getattr(here, name)) != (its := getattr(there, name)):
            yield f"the attack used {mine} {name}, stated {its}"
    low, high = sorted((here.flops, there.flops))
    if high > FLOPS_FACTOR * low:
        yield f"the attack took {here.flops:.3g} FLOPs, stated {there.flops:.3g}"
