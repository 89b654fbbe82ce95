"""What things cost: making a defense, honest use of a release, and breaking it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from benchmark.core.records import Cell
from benchmark.reporting.board import TIERS, Entry, Leaderboard, Use


def of_protecting(cells: Iterable[Cell]) -> tuple[float, float | None]:
    """Seconds of the defense where it took longest, and as a multiple of fine-tuning that expert.

    The multiple is None where no cell knows what fine-tuning took.
    """
    worst = max(cells, key=lambda cell: cell.seconds.protect)
    taken, expert = worst.seconds.protect, worst.seconds.expert
    return taken, taken / expert if expert > 0 else None


def of_honest_use(cells: Iterable[Cell]) -> dict[str, Use]:
    """Each use with mean accuracies over victims, partners and seeds, released beside expert."""
    found: dict[str, dict[tuple[object, ...], dict[str, float]]] = defaultdict(dict)
    for cell in cells:
        where = cell.testbed, cell.victim, tuple(cell.partners), cell.seed
        for use, accuracy in cell.benign.items():
            found[use][where] = accuracy
    return {
        use: Use(
            released=fmean(one["released"] for one in places.values()),
            expert=fmean(one["expert"] for one in places.values()),
        )
        for use, places in found.items()
    }


class Curve(NamedTuple):
    """Protection of one defense by what attacks used; ``points``: x → the entry that left least.

    At x = 0 that is the best attack (or none) with weights alone. ``x`` is ``per_class`` (labelled
    examples of each class) or ``flops`` (model FLOPs on data, of whatever tier). Where no attack of
    an x has a number, the entry says why.
    """

    testbed: str
    defense: str
    points: dict[float, Entry]

    def known(self) -> dict[float, Entry]:
        """The points that have a number."""
        return {x: entry for x, entry in self.points.items() if entry.protection is not None}


def break_curves(board: Leaderboard, x: Literal["per_class", "flops"]) -> list[Curve]:
    """A curve per testbed and defense that was attacked at one x > 0 or more; board's order.

    Points are not made to fall: an attack with more data faces a free-rider who has more without
    the victim, too, so protection may rise along the curve. Task-aware mergers are left out.
    """
    curves = []
    for testbed in dict.fromkeys(entry.testbed for entry in board.matrix):
        for row in board.rows:
            groups: dict[float, list[Entry]] = defaultdict(list)
            for entry in board.matrix:
                if (entry.testbed, entry.defense) == (testbed, row.defense) and not entry.task_id:
                    at = 0.0 if entry.access == TIERS[0] else float(getattr(entry, x))
                    if at or entry.access == TIERS[0]:
                        groups[at].append(entry)
            points = {at: _worst(groups[at]) for at in sorted(groups)}
            if any(points):
                curves.append(Curve(testbed, row.defense, points))
    return curves


def _worst(entries: Sequence[Entry]) -> Entry:
    """Least protection; an error goes before anything, for then the least is not known."""
    failed = [entry for entry in entries if entry.status == "error"]
    return min(
        failed or entries,
        key=lambda e: math.inf if e.protection is None else e.protection,
    )
