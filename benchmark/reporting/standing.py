"""Which rows have a rank, and why the others have none (DESIGN section 4).

Everything is decided from cells' figures, never from the flags they state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from benchmark.core.records import OF_MODULES, Cell
from benchmark.evaluation import thresholds, utility
from benchmark.evaluation.flags import is_two_faced
from benchmark.evaluation.scoring import Gains
from benchmark.evaluation.thresholds import Counts
from benchmark.reporting.board import GATE, Entry, Row, Standing, Track

if TYPE_CHECKING:
    from benchmark.api.contracts import Card

#: The attack that every release with modules of its own must face.
READ_SHIPPED = "read-shipped"

Place = tuple[str, str, tuple[str, ...], int, str, str]
Release = tuple[str, str, int]


def place(cell: Cell) -> Place:
    """Where a cell stands in the suite, whatever the defense."""
    return (cell.testbed, cell.victim, tuple(cell.partners), cell.seed, cell.attack, cell.merger)


def track_of(cells: Sequence[Cell]) -> Track:
    """The ranking to which a defense with these cells belongs."""
    if any(cell.duties for cell in cells):
        return "secrets"
    if any(cell.draws for cell in cells):
        return "generators"
    return "modules" if _foreign(cells) else "weights"


def _foreign(cells: Iterable[Cell]) -> bool:
    return any(cell.changes_modules for cell in cells)


def asked(
    cells: Iterable[Cell], methods: Mapping[str, Sequence[Cell]]
) -> dict[bool, dict[Place, float]]:
    """Mandatory places of weights, and (True) of other modules, with the benefit of merging there.

    ``methods``: the cells of each defense that may be ranked; what one of them answered, all must.
    The benefit is 0 where there is none, or nobody could merge.
    """
    benefit: dict[Place, float] = {}
    for cell in cells:
        gains = Gains.of(cell)
        benefit.setdefault(place(cell), 0.0)
        if gains is not None:
            benefit[place(cell)] = gains.benefit
    answered: dict[bool, set[Place]] = {False: set(), True: set()}
    for of in methods.values():
        answered[_foreign(of)] |= {place(cell) for cell in of}
    weights, modules = answered[False], answered[True]
    # Of weights is asked whatever anybody answered, but for what only other modules must stand.
    everybody = weights | {where for where in modules if where[4] not in OF_MODULES}
    return {
        False: {where: benefit[where] for where in everybody},
        True: {where: benefit[where] for where in everybody | modules},
    }


def wanted_of(
    cells: Iterable[Cell], asked: Mapping[bool, Mapping[Place, float]]
) -> Mapping[Place, float]:
    """Those of :func:`asked` that a defense with these cells must have answered."""
    return asked[_foreign(cells)]


def covered(cells: Iterable[Cell], wanted: Mapping[Place, float]) -> float | None:
    """The share of the benefit at ``wanted`` that lies in cells which count for these of a defense.

    A cell that the release empties, or that was left out, holds none. None where nobody had any.
    """
    own, held = dict(wanted), 0.0
    for cell in cells:
        gains = Gains.of(cell)
        if gains is not None and place(cell) in own:
            own[place(cell)] = gains.benefit
            held += 0.0 if gains.emptied else gains.benefit
    total = sum(own.values())
    return held / total if total > 0 else None


def utilities(cells: Iterable[Cell]) -> dict[Release, Counts]:
    """What each release answers right, by testbed, victim and seed; of several claims the worst."""
    found: dict[Release, Counts] = {}
    for cell in cells:
        counts = utility.of_release(cell)
        where = cell.testbed, cell.victim, cell.seed
        if counts and (where not in found or _lost(counts) > _lost(found[where])):
            found[where] = counts
    return found


def _lost(counts: Counts) -> Fraction:
    return thresholds.lost([counts])


def judge(
    row: Row, cells: Sequence[Cell], entries: Sequence[Entry], card: Card, wanted: Iterable[Place]
) -> tuple[Standing, str]:
    """The standing of a row whose figures are set, and the reason in words where it has no rank."""
    wanted = set(wanted)
    if card.role != "method":
        return card.role, ""
    if failed := [
        f"{e.attack} × {e.merger} on {e.testbed}" for e in entries if e.status == "error"
    ]:
        return "unranked", f"error in {_some(failed)}"
    if missing := len(wanted - {place(cell) for cell in cells}):
        return "unranked", f"{missing} of {len(wanted)} cells are missing"
    if reason := _unmeasured(cells):
        return "unranked", reason
    if row.covered is None or not row.robust:
        return "unranked", "no cell in which merging had a benefit"
    if row.covered < thresholds.COVERED:
        return "unranked", (
            f"cells that count hold {100 * row.covered:.0f} % of the suite's benefit of merging, "
            f"a rank needs {100 * thresholds.COVERED:.0f} %"
        )
    if faces := {cell.victim for cell in cells if is_two_faced(cell)}:
        return "two-faced", (
            f"two-faced: does over {float(100 * thresholds.TWO_FACED):g} points worse on what "
            f"attackers get than on the test split ({_some(sorted(faces))})"
        )
    counts = utilities(cells).values()
    if not thresholds.within_gate(counts):
        lost = points(thresholds.lost(counts))
        return "below-gate", f"fails the utility gate: {lost} points lost, {GATE:g} allowed"
    return "ranked", ""


def _unmeasured(cells: Sequence[Cell]) -> str:
    """What a rank needs and cells do not have; empty if nothing."""
    done = [cell for cell in cells if Gains.of(cell) is not None]
    releases = {(cell.testbed, cell.victim, cell.seed) for cell in done}
    if releases - utilities(done).keys():
        return "the release's own accuracy was not measured"
    if not _foreign(cells):
        return ""
    if releases - {(c.testbed, c.victim, c.seed) for c in done if c.seen is not None}:
        return "the release's accuracy on what attackers get was not measured"
    groups = {_group(cell) for cell in done}
    mandatory = {
        f"attack {READ_SHIPPED}": {_group(c) for c in done if _reads_shipped(c.attack)},
        "attacks with unlabeled data": {_group(c) for c in done if c.access == "unlabeled"},
    }
    lacking = [name for name, found in mandatory.items() if groups - found]
    return f"mandatory cells missing: {' and '.join(lacking)}" if lacking else ""


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.testbed, cell.victim, tuple(cell.partners), cell.seed


def _reads_shipped(attack: str) -> bool:
    return attack.partition("(")[0] == READ_SHIPPED


def points(lost: Fraction) -> str:
    """Points lost, over the gate, with as many digits as it takes to be seen over it."""
    value = float(100 * lost)
    return next((t for d in (1, 2, 3, 4, 5) if float(t := f"{value:.{d}f}") > GATE), f"{value:g}")


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
