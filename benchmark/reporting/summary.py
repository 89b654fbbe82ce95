"""What the console and the page say in words: scope, what there was to gain, verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from benchmark.core.records import Cell
from benchmark.reporting.board import TIERS, Entry, Row, Tier


class TaskLine(BaseModel):
    """One task of one testbed; accuracies in [0, 1], means over the cells that hold the task.

    ``merged[merger]`` is the free-rider's best undefended model that does use the victim.
    """

    model_config = ConfigDict(extra="forbid")

    testbed: str
    task: str
    label: str
    victim: bool = False
    zero_shot: float | None = None
    expert: float | None = None
    merged: dict[str, float] = Field(default_factory=dict)


def task_lines(cells: Iterable[Cell]) -> list[TaskLine]:
    """One line per testbed and task, the victims' first. ``merged`` needs undefended cells."""
    cells = list(cells)
    tasks: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        for task in cell.scored:
            tasks[cell.testbed, task].append(cell)
    several = len({testbed for testbed, _ in tasks}) > 1
    lines = []
    for (testbed, task), held in tasks.items():
        plain = [c for c in held if c.defense == c.attack == "none" and c.merged_accuracy]
        mergers = dict.fromkeys(c.merger for c in plain)
        victim = any(c.victim == task for c in held)
        lines.append(
            TaskLine(
                testbed=testbed,
                task=task,
                label=(f"{testbed}: {task}" if several else task) + (" (victim)" if victim else ""),
                victim=victim,
                zero_shot=_mean([c.zero_shot[task] for c in held if task in c.zero_shot]),
                expert=_mean([c.expert_accuracy[task] for c in held if task in c.expert_accuracy]),
                merged={
                    merger: value
                    for merger in mergers
                    if (value := _mean(_merged(plain, merger, task))) is not None
                },
            )
        )
    return sorted(lines, key=lambda line: (line.testbed, not line.victim))


def _merged(cells: Sequence[Cell], merger: str, task: str) -> list[float]:
    of = [c.merged_accuracy for c in cells if c.merger == merger]
    return [accuracy[task] for accuracy in of if task in accuracy]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def attacks_of(entries: Iterable[Entry]) -> dict[str, Tier]:
    """Attack → the least access it was run with; least access first, else as they appear."""
    least: dict[str, Tier] = {}
    for entry in entries:
        known = least.setdefault(entry.attack, entry.access)
        least[entry.attack] = min(known, entry.access, key=TIERS.index)
    return dict(sorted(least.items(), key=lambda item: TIERS.index(item[1])))


def scope(cells: Iterable[Cell], testbed: str, merger: str) -> str:
    """``minilm, victim r8 with bbc, seed 0``: what one matrix puts together."""
    of = [c for c in cells if (c.testbed, c.merger) == (testbed, merger)]
    victims = list(dict.fromkeys(c.victim for c in of))
    partners = {tuple(c.partners) for c in of}
    who = f"victim {victims[0]}" if len(victims) == 1 else f"{len(victims)} victims"
    if len(partners) == 1:
        who += f" with {', '.join(*partners)}"
    seeds = sorted({c.seed for c in of})
    when = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{testbed}, {who}, {when}"


def verdict(row: Row) -> str:
    """One sentence: why there is no rank, and the cheapest attack that breaks the defense."""
    parts = [row.reason] if row.reason else []
    found = row.broken_by
    if found is None:
        parts.append("no attack in this run breaks it" if row.robust else "nothing was measured")
    else:
        data = f"{found.examples} examples" if found.examples else "no data"
        means = "plain merging" if found.attack == "none" else found.attack
        tier = "weights only" if found.access == "weights" else f"{found.access} data"
        if found.per_class:
            data += f" ({found.per_class} per class)"
        work = f"{found.flops:.1e} FLOPs, " if found.flops else ""
        parts.append(f"broken by {means} ({tier}, {data}, {work}{found.seconds:.1f} s)")
    return "; ".join(parts)


class FixedLine(BaseModel):
    """Accuracy on the victims' tasks of one defense's unattacked merges at fixed coefficients."""

    model_config = ConfigDict(extra="forbid")

    testbed: str
    merger: str
    defense: str
    accuracy: dict[str, float]
    expert: float | None = None
    zero_shot: float | None = None


def fixed_lines(cells: Iterable[Cell], order: Sequence[str]) -> list[FixedLine]:
    """Means over victims, partners and seeds, defenses in the given order."""
    groups: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.fixed and cell.attack == "none" and cell.defense in order:
            groups[cell.testbed, cell.merger, cell.defense].append(cell)
    lines = []
    for (testbed, merger, defense), of in groups.items():
        known = dict.fromkeys(coefficient for cell in of for coefficient in cell.fixed)
        accuracy = {
            coefficient: value
            for coefficient in known
            if (value := _mean(_victims([c.fixed.get(coefficient, {}) for c in of], of)))
            is not None
        }
        lines.append(
            FixedLine(
                testbed=testbed,
                merger=merger,
                defense=defense,
                accuracy=accuracy,
                expert=_mean(_victims([c.expert_accuracy for c in of], of)),
                zero_shot=_mean(_victims([c.zero_shot for c in of], of)),
            )
        )
    return sorted(lines, key=lambda line: order.index(line.defense))


def _victims(per_task: Sequence[dict[str, float]], cells: Sequence[Cell]) -> list[float]:
    """Each cell's value on its own victim's task."""
    pairs = zip(per_task, cells, strict=True)
    return [values[cell.victim] for values, cell in pairs if cell.victim in values]


class AccuracyLine(BaseModel):
    """Mean test accuracy per task of the models free-riders end with; ``choices`` names them."""

    model_config = ConfigDict(extra="forbid")

    testbed: str
    merger: str
    defense: str
    attack: str
    choices: list[str]
    accuracy: dict[str, float]


def accuracy_lines(cells: Iterable[Cell], order: Sequence[str]) -> list[AccuracyLine]:
    """One line per testbed, merger, defense and attack; defenses in the given order."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.accuracy and cell.defense in order:
            groups[cell.testbed, cell.merger, cell.defense, cell.attack].append(cell)
    lines = [
        AccuracyLine(
            testbed=testbed,
            merger=merger,
            defense=defense,
            attack=attack,
            choices=sorted({c.choice for c in of if c.choice}),
            accuracy={
                task: value
                for task in dict.fromkeys(task for c in of for task in c.accuracy)
                if (value := _mean([c.accuracy[task] for c in of if task in c.accuracy]))
                is not None
            },
        )
        for (testbed, merger, defense, attack), of in groups.items()
    ]
    return sorted(lines, key=lambda line: (line.testbed, line.merger, order.index(line.defense)))
