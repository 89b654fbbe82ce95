"""From cells to ranks.

Robust protection at a tier is the least protection over all attacks (``none`` among them) and all
mergers of that tier and below, on every testbed of the run; task-aware mergers are kept apart. As
a minimum over noisy numbers it errs on the attacker's side, and its interval is that of the entry
which attained it. Methods are ranked by it at the weights tier, then at the labeled tier.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from benchmark.core.errors import UsageError
from benchmark.core.records import Cell, Status
from benchmark.evaluation.statistics import Aggregate, aggregate
from benchmark.reporting import costs
from benchmark.reporting.board import (
    BROKEN,
    EXACT,
    GATE,
    SEEDS_DIFFER,
    TIERS,
    WEAK_BEATS_STRONG,
    Break,
    Entry,
    Leaderboard,
    Row,
    Tier,
)

if TYPE_CHECKING:
    from benchmark.api.contracts import Card

UNATTACKED = UNDEFENDED = "none"
_ORDER = {"ranked": 0, "below-gate": 1, "unranked": 2, "control": 3, "reference": 4}


def card_of(spec: str) -> Card:
    """The card of a defense; that of an unknown method where it is not installed.

    A spec that names a Python file is not opened: a run may be somebody else's, and opening it
    would execute it. Whoever runs such a defense hands its card to :func:`rank`.
    """
    from benchmark.api.contracts import Card
    from benchmark.api.methods import defense

    if ".py:" in spec:
        return Card(summary="a file of its own, not opened")
    try:
        return defense(spec).method.card
    except UsageError:
        return Card(summary="not installed here")


def rank(cells: Iterable[Cell], cards: Callable[[str], Card] = card_of) -> Leaderboard:
    """The leaderboard of these cells. Every cell of the suite is mandatory for a rank.

    ``cards`` gives each defense's card: its role decides whether it is ranked at all.
    """
    cells = list(cells)
    by_defense: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_defense[cell.defense].append(cell)
    matrix = _matrix(cells)
    known = {spec: cards(spec) for spec in by_defense}
    asked = {_place(c) for c in cells if known[c.defense].role == "method"}
    rows = [
        _row(spec, own, [e for e in matrix if e.defense == spec], known[spec], asked)
        for spec, own in by_defense.items()
    ]
    _give_ranks([row for row in rows if row.standing == "ranked"])
    rows.sort(key=lambda row: (_ORDER[row.standing], row.rank or 0, _strength(row)))
    return Leaderboard(rows=rows, matrix=matrix, attack_flags=_attack_flags(cells, matrix))


def _place(cell: Cell) -> tuple[object, ...]:
    """Where a cell stands in the suite, whatever the defense."""
    partners = tuple(cell.partners)
    return cell.testbed, cell.victim, partners, cell.seed, cell.attack, cell.merger


def _matrix(cells: Sequence[Cell]) -> list[Entry]:
    groups: dict[tuple[str, str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.testbed, cell.merger, cell.defense, cell.attack].append(cell)
    return [_entry(group) for group in groups.values()]


def _entry(cells: Sequence[Cell]) -> Entry:
    """Put the cells of one defense × attack × merger together."""
    first, total = cells[0], aggregate(cells)
    status = _status(cells, total)
    value = total.estimate.value if status == "ok" else None
    return Entry(
        testbed=first.testbed,
        merger=first.merger,
        defense=first.defense,
        attack=first.attack,
        access=max((c.access for c in cells), key=TIERS.index),
        task_id=any(c.task_id for c in cells),
        status=status,
        reasons=sorted({c.reason for c in cells if c.reason and c.status == status != "ok"}),
        protection=value,
        interval=total.estimate.interval if status == "ok" else None,
        by_seed={s: v for s, v in total.by_seed.items() if not math.isnan(v)},
        winners=dict(Counter(str(c.ensemble["winner"]) for c in cells if c.ensemble)),
        cells=len(cells),
        examples=max(c.budget.examples for c in cells),
        per_class=max(c.budget.per_class for c in cells),
        steps=max(c.budget.steps for c in cells),
        flops=max(c.budget.flops for c in cells),
        seconds=max(c.seconds.recover for c in cells),  # shared work is 0 in all cells but one
    )


def _status(cells: Sequence[Cell], total: Aggregate) -> Status:
    found = {cell.status for cell in cells}
    if "error" in found:
        return "error"
    if not math.isnan(total.estimate.value):
        return "ok"
    return "skipped" if found == {"skipped"} else "no-benefit"


def _row(
    spec: str,
    cells: Sequence[Cell],
    entries: Sequence[Entry],
    card: Card,
    asked: set[tuple[object, ...]],
) -> Row:
    valid = [entry for entry in entries if entry.status == "ok"]
    seconds, multiple = costs.of_protecting(cells)
    row = Row(
        defense=spec,
        role=card.role,
        robust=_robust([entry for entry in valid if not entry.task_id]),
        robust_task_aware=_robust([entry for entry in valid if entry.task_id]),
        unattacked=_least([e for e in valid if e.attack == UNATTACKED and not e.task_id]),
        broken_by=_break(valid),
        logit_gap=max((c.logit_gap for c in cells if c.logit_gap is not None), default=None),
        protect_seconds=seconds,
        protect_multiple=multiple,
        benign=costs.of_honest_use(cells),
    )
    _set_utility(row, cells)
    row.flags = _flags(row, cells, entries, card)
    missing = len(asked - {_place(cell) for cell in cells})
    failed = [f"{e.attack} × {e.merger} on {e.testbed}" for e in entries if e.status == "error"]
    if card.role != "method":
        row.standing = card.role
    elif failed:
        row.standing, row.reason = "unranked", f"error in {_some(failed)}"
    elif missing:
        row.standing, row.reason = "unranked", f"{missing} of {len(asked)} cells are missing"
    elif not row.robust:
        row.standing, row.reason = "unranked", "no cell in which merging had a benefit"
    elif "utility-gate" in row.flags:
        row.standing = "below-gate"
        row.reason = f"fails the utility gate: {row.drop:.1f} points lost, {GATE} allowed"
    return row


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _least(entries: Iterable[Entry]) -> Entry | None:
    return min(entries, key=lambda e: e.protection or 0.0, default=None)


def _robust(entries: Sequence[Entry]) -> dict[Tier, Entry]:
    found = {}
    for level, tier in enumerate(TIERS):
        least = _least([e for e in entries if TIERS.index(e.access) <= level])
        if least is not None:
            found[tier] = least
    return found


def _break(entries: Iterable[Entry]) -> Break | None:
    """The cheapest way under 0.5. Where no attack is needed, none is named, however fast it is."""
    broken = [e for e in entries if e.protection is not None and e.protection < BROKEN]
    if not broken:
        return None
    best = min(
        broken,
        key=lambda e: (
            *(TIERS.index(e.access), e.task_id),
            *(e.examples, e.flops, e.attack != "none", e.seconds, e.protection or 0),
        ),
    )
    fields = best.model_dump(include=set(Break.model_fields))
    return Break(**fields)


def _set_utility(row: Row, cells: Iterable[Cell]) -> None:
    """Means over (testbed, victim, seed) of the released model and of the expert, on the victim."""
    found: dict[tuple[str, str, int], tuple[float, float]] = {}
    for cell in cells:
        if cell.utility is not None and cell.victim in cell.expert_accuracy:
            where = cell.testbed, cell.victim, cell.seed
            found[where] = cell.utility, cell.expert_accuracy[cell.victim]
    if found:
        released, expert = zip(*found.values(), strict=True)
        row.utility = sum(released) / len(released)
        row.expert = sum(expert) / len(expert)
        row.drop = 100 * (row.expert - row.utility)


def _flags(row: Row, cells: Sequence[Cell], entries: Sequence[Entry], card: Card) -> list[str]:
    """The cells' own flags, and those that only show when cells are put together."""
    flags = {flag for cell in cells for flag in cell.flags if flag != "destructive-attack"}
    if row.drop is not None and round(row.drop, 9) > GATE:
        flags.add("utility-gate")
    if card.exact and row.logit_gap is not None and not row.logit_gap <= EXACT:
        flags.add("not-equivalent")
    if any(cell.status == "no-benefit" for cell in cells):
        flags.add("no-benefit")
    for entry in entries:
        values = entry.by_seed.values()
        if values and max(values) - min(values) > SEEDS_DIFFER:
            flags.add("seed-dependent")
    return sorted(flags)


def _attack_flags(cells: Iterable[Cell], matrix: Iterable[Entry]) -> dict[str, list[str]]:
    """``destructive-attack``: it damages the undefended expert, on which it has nothing to undo.
    ``weak-attack-beats-strong``: one with less access leaves less protection somewhere."""
    drops: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        expert = cell.expert_accuracy.get(cell.victim)
        if cell.defense == UNDEFENDED and cell.standalone is not None and expert is not None:
            drops[cell.attack].append(100 * (expert - cell.standalone))
    flags: dict[str, set[str]] = defaultdict(set)
    for attack, values in drops.items():
        if round(sum(values) / len(values), 9) > GATE:
            flags[attack].add("destructive-attack")
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in matrix:
        if entry.status == "ok" and entry.defense != UNDEFENDED:
            groups[entry.testbed, entry.merger, entry.defense].append(entry)
    for group in groups.values():
        for strong in group:
            less = [e.shown for e in group if TIERS.index(e.access) < TIERS.index(strong.access)]
            if less and min(less) < strong.shown - WEAK_BEATS_STRONG:
                flags[strong.attack].add("weak-attack-beats-strong")
    return {attack: sorted(found) for attack, found in sorted(flags.items())}


def _strength(row: Row) -> tuple[float, float, str]:
    """Sort key: most protection first."""
    values = [row.robust[t].shown if t in row.robust else -1.0 for t in ("weights", "labeled")]
    return -values[0], -values[1], row.defense


def _groups(rows: Sequence[Row], tier: Tier) -> list[list[Row]]:
    """Runs of rows whose interval overlaps that of the best of the run (clipped, as displayed)."""
    ordered = sorted(rows, key=lambda r: -r.robust[tier].shown if tier in r.robust else 1.0)
    groups: list[list[Row]] = []
    for row in ordered:
        if groups and _overlap(groups[-1][0].robust.get(tier), row.robust.get(tier)):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _overlap(best: Entry | None, other: Entry | None) -> bool:
    if best is None or other is None:
        return best is other
    return other.bounds[1] >= best.bounds[0]


def _give_ranks(rows: Sequence[Row]) -> None:
    """Ranks 1, 2=, 2=, 4: a tie at the weights tier is decided at the labeled one, or stays."""
    position = 1
    for at_weights in _groups(rows, "weights"):
        for group in _groups(at_weights, "labeled"):
            for row in group:
                row.rank, row.tied = position, len(group) > 1
            position += len(group)
