"""What a certificate proves: that an attack leaves less of an entry's protection than was known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured
from benchmark.reporting.board import TIERS, Tier, clip
from leaderboard.entry import Certificate, Entry
from leaderboard.runs import board

#: So much less protection, in points of 1, makes a stronger attack; less is chance.
MARGIN = 0.01


def without_merit(entry: Entry) -> Iterator[str]:
    """Certificates that did not lower what was known when they were added."""
    for number, certificate in enumerate(entry.certificates, start=1):
        before = entry.model_copy(update={"certificates": entry.certificates[: number - 1]})
        if not lowers(before, certificate):
            yield f"certificate {number}: {certificate.attack} is no stronger than what was known"


def lowers(entry: Entry, certificate: Certificate) -> bool:
    """Whether a certificate leaves less protection than was known without it."""
    before = best_known(entry)
    with_it = (*entry.certificates, certificate)
    after = best_known(entry.model_copy(update={"certificates": with_it}))
    return any(value <= before.get(tier, 2.0) - MARGIN for tier, value in after.items())


def best_known(entry: Entry) -> dict[Tier, float]:
    """The least protection by tier, over the suite's attacks and all certificates (clipped)."""
    found: dict[Tier, float] = {}
    for tier in TIERS:
        reach = TIERS[: TIERS.index(tier) + 1]
        values = [
            value
            for cells in (entry.cells, *(certificate.cells for certificate in entry.certificates))
            for value in protections([c for c in cells if c.access in reach], entry)
        ]
        if values:
            found[tier] = min(values)
    return found


def protections(cells: Sequence[Cell], entry: Entry) -> list[float]:
    """Protection by attack and merger (clipped) that these cells of the entry leave."""
    if not cells:
        return []
    matrix = board(cells, lambda spec: entry.defense.card).matrix
    return [clip(e.protection) for e in matrix if e.protection is not None and not e.task_id]


def same_release(entry: Entry, cells: Sequence[Cell]) -> bool:
    """Whether base, expert and release are the entry's own, bit for bit."""
    stated = entry.subjects
    return all(
        (cell.sha256.base, cell.sha256.expert, cell.sha256.released)
        == (
            stated.base,
            stated.experts.get(cell.victim),
            stated.released.get(f"{cell.victim}/{cell.seed}"),
        )
        for cell in cells
        if measured(cell)
    )
