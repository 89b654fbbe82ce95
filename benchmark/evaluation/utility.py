"""What a model loses against the expert it comes from, in counts of test examples."""

from __future__ import annotations

from benchmark.core.records import Cell
from benchmark.evaluation.statistics import unpack_bits
from benchmark.evaluation.thresholds import Counts, lost


def judged(cell: Cell) -> dict[str, Counts]:
    """Task → (expert, release as shipped, n), where measured: the victim's own, or its duties."""
    experts, releases = (cell.correct.get(who, {}) for who in ("expert", "released"))
    found = {}
    for task in cell.duties or [cell.victim]:
        if task in experts and task in releases:
            right = unpack_bits(experts[task])
            kept = unpack_bits(releases[task], len(right))
            found[task] = int(right.sum()), int(kept.sum()), len(right)
    return found


def worst(cell: Cell) -> str | None:
    """The task on which the release loses most; None where one was not measured."""
    found = judged(cell)
    if len(found) < max(1, len(cell.duties)):
        return None
    return max(found, key=lambda task: lost([found[task]]))


def of_release(cell: Cell) -> Counts | None:
    """(expert, release as shipped, n) on the :func:`worst` task; None where there is none."""
    task = worst(cell)
    return None if task is None else judged(cell)[task]


def of_attack(cell: Cell) -> Counts | None:
    """(expert, recovered model used alone, n) on the victim's task; None where not measured, or
    where that task are secrets."""
    expert = cell.correct.get("expert", {}).get(cell.victim)
    if expert is None or cell.standalone is None or cell.duties:
        return None
    right = unpack_bits(expert)
    return int(right.sum()), round(cell.standalone * len(right)), len(right)
