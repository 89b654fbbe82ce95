"""From cells to ranks.

Robust protection at a tier is the least protection over all attacks (``none`` among them) and all
mergers of that tier and below, on every testbed of the run; task-aware mergers are kept apart. Its
lower end is the least lower end of any of their intervals, and by that methods are ranked, at the
weights tier and then at the higher ones: a wide interval never helps. Weights and releases with
modules of their own are ranked apart.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING

from benchmark.core.errors import UsageError
from benchmark.core.records import Cell, Status
from benchmark.evaluation import flags, thresholds, utility
from benchmark.evaluation.flags import UNDEFENDED
from benchmark.evaluation.scoring import Gains
from benchmark.evaluation.statistics import Aggregate, aggregate
from benchmark.evaluation.thresholds import BROKEN, SEEDS_DIFFER, WEAK_BEATS_STRONG
from benchmark.reporting import costs, standing
from benchmark.reporting.board import (
    STANDINGS,
    TIERS,
    TRACKS,
    Break,
    Entry,
    Leaderboard,
    Leaks,
    Robust,
    Row,
    Tier,
    Use,
    clip,
)
from benchmark.reporting.standing import Place

if TYPE_CHECKING:
    from benchmark.api.contracts import Card

UNATTACKED = "none"
#: Flags of a cell that are not those of its row: a mean decides, or they are an attack's.
_OF_CELLS_ONLY = {"utility-gate", "destructive-attack"}


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
    methods = {spec: of for spec, of in by_defense.items() if known[spec].role == "method"}
    wanted = standing.asked(cells, methods)
    rows = [
        _row(
            spec,
            own,
            [e for e in matrix if e.defense == spec],
            known[spec],
            standing.wanted_of(own, wanted),
        )
        for spec, own in by_defense.items()
    ]
    for track in TRACKS:
        give_ranks([row for row in rows if row.standing == "ranked" and row.track == track])
    order = list(STANDINGS)
    rows.sort(
        key=lambda row: (
            list(TRACKS).index(row.track),
            order.index(row.standing),
            row.rank or 0,
            [-low for low in lows(row)],
            row.defense,
        )
    )
    return Leaderboard(rows=rows, matrix=matrix, attack_flags=_attack_flags(cells, matrix))


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
        one_coefficient=all(c.one_coefficient for c in cells),
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
    wanted: Mapping[Place, float],
) -> Row:
    valid = [entry for entry in entries if entry.status == "ok"]
    plain = [entry for entry in valid if not entry.task_id]
    seconds, multiple = costs.of_protecting(cells)
    row = Row(
        defense=spec,
        role=card.role,
        track=standing.track_of(cells),
        robust=_robust([entry for entry in entries if not entry.task_id]),
        robust_task_aware=_robust([entry for entry in entries if entry.task_id]),
        unattacked=_least([entry for entry in plain if entry.attack == UNATTACKED]),
        as_published=_as_published(plain),
        broken_by=_break(valid),
        covered=standing.covered(cells, wanted),
        logit_gap=max((c.logit_gap for c in cells if c.logit_gap is not None), default=None),
        protect_seconds=seconds,
        protect_multiple=multiple,
        benign=costs.of_honest_use(cells),
        leaks=_leaks(cells),
        quality=_quality(cells),
    )
    _set_utility(row, cells)
    row.flags = _flags(cells, entries, card)
    row.standing, row.reason = standing.judge(row, cells, entries, card, wanted)
    return row


def _least(entries: Iterable[Entry]) -> Entry | None:
    return min(entries, key=lambda e: e.protection or 0.0, default=None)


def _robust(entries: Sequence[Entry]) -> dict[Tier, Robust]:
    """By tier that was run: never a number where no attack and no merger used such access."""
    run = {entry.access for entry in entries if entry.status != "skipped"}
    found = {}
    for level, tier in enumerate(TIERS):
        within = [e for e in entries if e.status == "ok" and TIERS.index(e.access) <= level]
        least = _least(within)
        if tier in run and least is not None:
            low = min(entry.interval[0] if entry.interval else 0.0 for entry in within)
            found[tier] = Robust(**least.model_dump(), low=low)
    return found


def _as_published(entries: Sequence[Entry]) -> Entry | None:
    """Unattacked, through the run's first merger with one coefficient for all."""
    fitting = [e for e in entries if e.attack == UNATTACKED and e.one_coefficient]
    return _least([entry for entry in fitting if entry.merger == fitting[0].merger])


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
    counts = standing.utilities(cells).values()
    if counts:
        row.utility = sum(released / n for _, released, n in counts) / len(counts)
        row.expert = sum(expert / n for expert, _, n in counts) / len(counts)
        row.drop = float(100 * thresholds.lost(counts))


def _leaks(cells: Sequence[Cell]) -> Leaks | None:
    """What comes out of victims that keep secrets; None where there are none."""
    measured = [(cell, gains) for cell in cells if cell.duties and (gains := Gains.of(cell))]
    if not measured:
        return None
    through: dict[tuple[str, str, str], list[Gains]] = defaultdict(list)
    for cell, gains in measured:
        through[cell.testbed, cell.attack, cell.merger].append(gains)
    worst = max(through.values(), key=lambda of: fmean(gains.attacked for gains in of))
    kept: dict[str, list[thresholds.Counts]] = defaultdict(list)
    for cell, _ in measured:
        for task, counts in utility.judged(cell).items():
            kept[task].append(counts)
    return Leaks(
        outside=fmean(gains.outside for gains in worst),
        attacked=fmean(gains.attacked for gains in worst),
        undefended=fmean(gains.undefended for gains in worst),
        kept={
            task: Use(
                released=fmean(released / n for _, released, n in of),
                expert=fmean(expert / n for expert, _, n in of),
            )
            for task, of in kept.items()
        },
    )


def _quality(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Means over cells of what was measured of each model's samples."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for who, measures in cell.quality.items():
            for name, value in measures.items():
                found[who][name].append(value)
    return {
        who: {name: fmean(values) for name, values in measures.items()}
        for who, measures in found.items()
    }


def _flags(cells: Sequence[Cell], entries: Sequence[Entry], card: Card) -> list[str]:
    """Of cells, as stated and as their figures raise them, and those of cells put together."""
    found = {flag for cell in cells for flag in cell.flags}
    found |= {flag for cell in cells for flag in flags.of_cell(cell, card, growth=math.nan)}
    found -= _OF_CELLS_ONLY
    if not thresholds.within_gate(standing.utilities(cells).values()):
        found.add("utility-gate")
    for entry in entries:
        values = entry.by_seed.values()
        if values and max(values) - min(values) > SEEDS_DIFFER:
            found.add("seed-dependent")
    return sorted(found)


def _attack_flags(cells: Iterable[Cell], matrix: Iterable[Entry]) -> dict[str, list[str]]:
    """``destructive-attack``: it damages the undefended expert, on which it has nothing to undo.
    ``weak-attack-beats-strong``: one with less access leaves less protection somewhere."""
    counts: dict[str, list[thresholds.Counts]] = defaultdict(list)
    for cell in cells:
        if cell.defense == UNDEFENDED and (found := utility.of_attack(cell)):
            counts[cell.attack].append(found)
    raised: dict[str, set[str]] = defaultdict(set)
    for attack, several in counts.items():
        if not thresholds.within_gate(several):
            raised[attack].add("destructive-attack")
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in matrix:
        if entry.status == "ok" and entry.defense != UNDEFENDED:
            groups[entry.testbed, entry.merger, entry.defense].append(entry)
    for group in groups.values():
        for strong in group:
            less = [e.shown for e in group if TIERS.index(e.access) < TIERS.index(strong.access)]
            if less and min(less) < strong.shown - WEAK_BEATS_STRONG:
                raised[strong.attack].add("weak-attack-beats-strong")
    return {attack: sorted(names) for attack, names in sorted(raised.items())}


def lows(row: Row) -> list[float]:
    """What is ranked by: the lower end of robust protection at each tier, least access first.

    Clipped and to two decimals, as displayed; a tier that was not run counts as nothing.
    """
    return [round(clip(row.robust[t].low), 2) if t in row.robust else -1.0 for t in TIERS]


def give_ranks(rows: Sequence[Row]) -> None:
    """Ranks 1, 2=, 2=, 4. What is equal at the weights tier is decided at the higher ones."""
    position = 1
    for _, group in groupby(sorted(rows, key=lows, reverse=True), key=lows):
        equal = list(group)
        for row in equal:
            row.rank, row.tied = position, len(equal) > 1
        position += len(equal)
