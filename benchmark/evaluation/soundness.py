"""Whether a cell that was read from a file says what follows from its own outcomes per example.

A record that somebody edited, or that a disk damaged, is not believed: whoever reads one asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmark.core.errors import UnmergeBenchError
from benchmark.core.records import Cell
from benchmark.evaluation import utility
from benchmark.evaluation.flags import FLAGS, UNDEFENDED
from benchmark.evaluation.scoring import (
    SITUATIONS,
    Gains,
    accuracies,
    gain,
    is_release,
    normalized,
    units,
)
from benchmark.evaluation.statistics import MODELS, ratio_protection, unpack_bits

#: Whose outcomes on every task a cell holds; and ``released``, on the victim's alone.
GROUPS = (*MODELS, "base")
#: Figures are recomputed from the same outcomes by the same arithmetic.
EXACTLY = 1e-9


def measured(cell: Cell) -> bool:
    """Whether it holds figures."""
    return cell.status in ("ok", "no-benefit")


def problems(cell: Cell) -> Iterator[str]:
    """Everything wrong with a cell by itself: parts that do not fit, or what does not follow."""
    if unknown := sorted(set(cell.flags) - FLAGS.keys()):
        yield f"unknown flag {unknown[0][:60]}"
    if found := unfit(cell):
        yield found
    elif measured(cell):
        yield from contradictions(cell)


def unfit(cell: Cell) -> str:
    """Why the parts of a cell cannot be put together; empty if they can."""
    if cell.ensemble and not isinstance(cell.ensemble.get("winner"), str):
        return "an ensemble without a winner"
    if any(accuracy.keys() != {"released", "expert"} for accuracy in cell.benign.values()):
        return "benign use without released and expert"
    return _unfit_outcomes(cell) if measured(cell) else ""


def _unfit_outcomes(cell: Cell) -> str:
    if Gains.of(cell) is None:
        return "a measured cell without its gains"
    if (cell.protection is None) != (cell.status == "no-benefit"):
        return f"a cell with status {cell.status} and protection {cell.protection}"
    tasks, duties = set(cell.scored), set(cell.duties)
    wanted = {**dict.fromkeys(GROUPS, tasks), "released": {cell.victim, *duties}}
    wanted["expert"] = tasks | duties
    if {model: set(outcomes) for model, outcomes in cell.correct.items()} != wanted:
        return "outcomes of other models or tasks than the cell's"
    if cell.expert_accuracy.keys() != tasks:
        return "accuracies of other tasks than the cell's"
    for task in tasks | duties:
        packed = [outcomes[task] for outcomes in cell.correct.values() if task in outcomes]
        try:
            sizes = {len(unpack_bits(text)) for text in packed}
            right = unpack_bits(cell.correct["expert"][task])
        except UnmergeBenchError as error:
            return str(error)
        if len(sizes) > 1 or not len(right):
            return f"outcomes on {task!r} differ in number, or are none"
        if not right.any() and (task in duties or not duties):
            return f"the expert has none right on {task!r}"
    return ""


def contradictions(cell: Cell) -> Iterator[str]:
    """Which figures of a measured cell, whose parts fit, do not follow from its outcomes."""
    follow = follows(cell)
    if (status := follow.pop("status")) != cell.status:
        yield f"status {cell.status} does not follow from its gains, which say {status}"
    for name, value in follow.items():
        if not same(getattr(cell, name), value):
            yield f"{name} does not follow from its outcomes"
    # Of the undefended expert the best merge is measured, too, where something else won.
    won = cell.sha256.merged or cell.defense != UNDEFENDED
    if cell.merged_accuracy and won and not same(cell.merged_accuracy, cell.accuracy):
        yield "merged_accuracy does not follow from its outcomes"


def follows(cell: Cell) -> dict[str, Any]:
    """Field → what follows from the outcomes of a measured cell, and which outside option won."""
    bits = {
        who: {task: unpack_bits(text) for task, text in outcomes.items()}
        for who, outcomes in cell.correct.items()
    }
    accuracy = accuracies(bits["attacked"])
    own = accuracies({task: bits["expert"][task] for task in cell.scored})
    expert, released, n = utility.of_release(cell) or (0, 0, 1)
    alone, secrets = is_release(cell.outside_choice), bool(cell.duties)
    unit = units(own, secrets=secrets)
    gains = Gains.made((gain(bits[who], unit) for who in SITUATIONS), alone=alone)
    left, interval = gains.protection, None
    if left is not None:
        interval = ratio_protection(
            cell.correct, alone=alone, scope=cell.testbed, secrets=secrets
        ).interval
    return {
        "status": gains.status,
        "accuracy": accuracy,
        "expert_accuracy": own,
        "zero_shot": accuracies(bits["base"]),
        "normalized": normalized(accuracy, unit),
        "gain": gains.attacked,
        "gain_undefended": gains.undefended,
        "gain_outside": gains.outside,
        "gain_reference": gains.reference,
        "protection": left,
        "protection_ci": interval,
        "utility": released / n,
        "utility_drop": (expert - released) / n,
    }


def same(stated: Any, found: Any) -> bool:
    """Whether two figures, or several by name or in order, are equal but for the last digits."""
    if isinstance(found, dict):
        return (
            isinstance(stated, dict)
            and stated.keys() == found.keys()
            and all(same(stated[key], value) for key, value in found.items())
        )
    if isinstance(found, tuple):
        return stated is not None and all(map(same, stated, found))
    if found is None or stated is None:
        return stated is found
    return bool(np.isclose(stated, found, rtol=0, atol=EXACTLY))
