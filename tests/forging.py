"""How an entry is forged: changes of its JSON, each consistent with itself where it says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from small_entries import PARTNER, VICTIM, follow

from benchmark.core.records import Cell
from benchmark.evaluation.statistics import pack_bits, unpack_bits
from benchmark.pipeline.suite import Suite

Data = dict[str, Any]
#: Of an entry's JSON, or of a cell's.
Change = Callable[[Data], object]


def flipped(text: str, up: int = 0, down: int = 0, seed: int = 0) -> str:
    """Packed outcomes with so many wrong ones made right, and right ones wrong."""
    bits = unpack_bits(text).copy()
    rng = np.random.default_rng(seed)
    wrong, right = rng.permutation(np.flatnonzero(~bits)), rng.permutation(np.flatnonzero(bits))
    bits[wrong[:up]], bits[right[:down]] = True, False
    return pack_bits(bits)


def cells(data: Data, attack: str = "", merger: str = "") -> Iterator[Data]:
    """Cells of the entry: all, or those of an attack or merger."""
    for cell in data["cells"]:
        if attack in ("", cell["attack"]) and merger in ("", cell["merger"]):
            yield cell


def first(data: Data, attack: str = "", merger: str = "") -> Data:
    """The first of ``cells``."""
    return next(cells(data, attack, merger))


def forge(cell: Data, group: str, up: int = 0, down: int = 0, seed: int = 0) -> None:
    """Flip so many outcomes on each task, and let every figure follow."""
    cell["correct"][group] = {
        task: flipped(text, up, down, seed) for task, text in cell["correct"][group].items()
    }
    settle(cell)


def settle(cell: Data) -> None:
    """Every figure as it follows from the outcomes."""
    cell.update(follow(Cell.model_validate(cell)).model_dump(mode="json"))


def everywhere(group: str, up: int = 0, down: int = 0, **only: str) -> Change:
    """Flip outcomes of a group in all cells, or in those of an attack or merger; differently in
    each, unless the group is one of those that all cells share."""

    def change(data: Data) -> None:
        one = group in ("expert", "base", "released")
        for number, cell in enumerate(cells(data, **only)):
            forge(cell, group, up, down, 0 if one else number)

    return change


def claimed(protection: float, both_ways: int) -> Change:
    """As if so much protection were left in every cell, with outcomes flipped in both directions:
    what made the tolerance of a paired test as wide as the forger liked."""

    def change(data: Data) -> None:
        for cell in cells(data):
            raised = [
                (1 - protection) * unpack_bits(cell["correct"]["undefended"][task]).sum()
                + protection * unpack_bits(cell["correct"]["outside"][task]).sum()
                for task in (VICTIM, PARTNER)
            ]
            for task, wanted in zip((VICTIM, PARTNER), raised, strict=True):
                text = cell["correct"]["attacked"][task]
                net = round(float(wanted)) - int(unpack_bits(text).sum())
                up, down = max(net, 0) + both_ways, max(-net, 0) + both_ways
                cell["correct"]["attacked"][task] = flipped(text, up, down)
            settle(cell)

    return change


def another_choice(down: int) -> Change:
    """A cell as if validation had picked another setting, with which less is right."""
    setting = {"coefficients": [0.1, 0.9]}
    return then(update(setting=setting, merged_setting=setting), forged("attacked", down=down))


def emptied(status: str, reason: str) -> Change:
    """A cell as if it had not been measured."""

    def change(cell: Data) -> None:
        where = ("key", "testbed", "victim", "partners", "seed", "defense", "attack", "merger")
        kept = {name: cell[name] for name in (*where, "access", "task_id")}
        cell.clear()
        cell.update(kept, status=status, reason=reason)

    return change


def one(change: Change, **only: str) -> Change:
    """The change in the first cell, or the first of an attack or merger."""
    return lambda data: change(first(data, **only))


def then(*changes: Change) -> Change:
    """One change after the other."""

    def change(data: Data) -> None:
        for one in changes:
            one(data)

    return change


def forged(group: str, up: int = 0, down: int = 0) -> Change:
    """``forge`` as a change of a cell."""
    return lambda cell: forge(cell, group, up, down)


def copied(group: str, of: str) -> Change:
    """A cell's outcomes of one group in place of another's."""

    def change(cell: Data) -> None:
        cell["correct"][group] = dict(cell["correct"][of])
        settle(cell)

    return change


def no_benefit_of(merger: str) -> Change:
    """A reference as good as the undefended merge, in every cell of a merger: nothing is left to
    protect there, and attacks with weights alone still have one outside option."""

    def change(data: Data) -> None:
        reference = dict(first(data, "none", merger)["correct"]["undefended"])
        for cell in cells(data, merger=merger):
            cell["correct"]["reference"] = reference
            settle(cell)

    return change


def update(**fields: object) -> Change:
    """Set values of an entry or a cell."""
    return lambda data: data.update(fields)


def inside(part: str, **fields: object) -> Change:
    """Set values of a part of an entry or a cell."""
    return lambda data: data[part].update(fields)


def every(change: Change, **only: str) -> Change:
    """The change in all cells, or in those of an attack or merger."""
    return lambda data: [change(cell) for cell in cells(data, **only)]


def foreign(spec: str) -> Change:
    """Another defense, with everything that names it."""

    def change(data: Data) -> None:
        data["defense"]["spec"] = spec
        data["suite"]["definition"]["defenses"] = [spec]
        data["suite"]["hash"] = Suite.model_validate(data["suite"]["definition"]).hash
        for cell in data["cells"]:
            cell["defense"] = spec

    return change


def replayed(change: Change, same: bool = True) -> Change:
    """A certificate by a rival: the cells without an attack, under another's name and changed."""

    def add(data: Data) -> None:
        made = [copy.deepcopy(cell) for cell in cells(data, "none")]
        for cell in made:
            cell["attack"] = "canonical"
            cell["fixed"] = {}
            cell["sha256"]["recovered"] = "5" * 64
            change(cell)
        data["certificates"] = [
            {
                "attack": "canonical",
                "merger": ", ".join(cell["merger"] for cell in made),
                "credit": "A. Rival",
                "same_release": same,
                "created": "2030-02-01T00:00:00Z",
                "cells": made,
            }
        ]

    return add
