"""What a model loses against the expert it comes from, in counts of test examples."""

from __future__ import annotations

from benchmark.core.records import Cell
from benchmark.evaluation.statistics import unpack_bits
from benchmark.evaluation.thresholds import Counts


def of_release(cell: Cell) -> Counts | None:
    """(expert, release as shipped, n) on the victim's task; None where it was not measured."""
    expert = cell.correct.get("expert", {}).get(cell.victim)
    released = cell.correct.get("released", {}).get(cell.victim)
    if expert is None or released is None:
        return None
    right = unpack_bits(expert)
    return int(right.sum()), int(unpack_bits(released, len(right)).sum()), len(right)


def of_attack(cell: Cell) -> Counts | None:
    """(expert, recovered model used alone, n) on the victim's task; None where not measured."""
    expert = cell.correct.get("expert", {}).get(cell.victim)
    if expert is None or cell.standalone is None:
        return None
    right = unpack_bits(expert)
    return int(right.sum()), round(cell.standalone * len(right)), len(right)
