"""Fabricated entries for the tests of the page: no result is measured here."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fabricated import ATTACKS, LABELED, STRENGTH, cards, cell

from benchmark.api.contracts import Card
from benchmark.core.records import Cell, Spent
from benchmark.pipeline.suite import Group, Suite
from leaderboard import folder
from leaderboard.entry import Certificate, Entry, Method, Subjects, SuiteId

HASH = "a" * 64
MERGERS = ("task-arithmetic", "ties")


def entry(
    defense: str = "params", *, suite: str = "quick", number: int = 1, card: Card | None = None,
    strength: tuple[float, ...] | None = None, mergers: tuple[str, ...] = MERGERS,
    task_aware: bool = False, n: int = 100, **fields: object,
) -> Entry:  # fmt: skip
    """One defense against all attacks of :mod:`fabricated`, plausibly strong."""
    values = strength or STRENGTH.get(defense, STRENGTH["params"])
    cells = [
        _cell(defense, attack, merger, value, n, task_id=task_aware and merger == "ties")
        for merger in mergers
        for attack, value in zip(ATTACKS, values, strict=True)
    ]
    asked = Suite(
        name=suite, description=f"the suite {suite}", testbed="minilm",
        groups=(Group(victim="r8", partners=("bbc",)),), defenses=(defense,), attacks=ATTACKS,
        mergers=mergers, test=n, fixed_coefficients=(0.3, 0.8),
    )  # fmt: skip
    made: dict[str, object] = {
        "version": f"{suite}-{number}",
        "suite": SuiteId(name=suite, hash=asked.hash, definition=asked),
        "defense": Method(spec=defense, card=card or cards(defense), source_sha256=HASH),
        "subjects": Subjects(
            testbed="minilm", data=HASH, base=HASH, experts={"r8": HASH}, released={"r8/0": HASH}
        ),
        "cells": tuple(cells),
        "environment": {"python": "3.12"},
        "created": datetime(2030, 1, number, tzinfo=UTC),
    }
    return Entry(**{**made, **fields})  # type: ignore[arg-type]


def _cell(
    defense: str, attack: str, merger: str, value: float, n: int, *, task_id: bool = False
) -> Cell:
    budget = Spent(examples=16, per_class=4, flops=1e9) if attack in LABELED else Spent()
    return cell(
        defense, attack, merger, value, n=n, task_id=task_id, budget=budget,
        one_coefficient=merger == "ties" and not task_id,
    )  # fmt: skip


def certificate(defense: str = "params", left: float = 0.0) -> Certificate:
    """A stronger attack, with credit."""
    return Certificate(
        attack="gauge-align+aga", merger="ties", credit="A. Rival", same_release=True,
        created=datetime(2030, 2, 1, tzinfo=UTC),
        cells=(_cell(defense, "gauge-align+aga", "ties", left, 100),),
    )  # fmt: skip


def written(home: Path, *entries: Entry) -> Path:
    """A folder with these entries."""
    for one in entries:
        folder.write(home, one)
    return home


def several(home: Path) -> Path:
    """Two suites, a certificate, a superseded and an invalidated entry, a task-aware merger."""
    return written(
        home,
        *(
            entry(name, credit="A. Author", task_aware=True)
            for name in STRENGTH
            if name != "params"
        ),
        entry("params", superseded_by="quick-2"),
        entry("params", number=2, task_aware=True, certificates=(certificate(),)),
        entry("params", suite="smoke", mergers=("ties",)),
        entry("trap", suite="smoke", mergers=("ties",)),
        entry("fraud", invalidated="its release was not the one measured"),
    )


EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


def hostile() -> Entry:
    """An entry whose every text tries to become markup, a script, a link or a formula."""
    card = Card(
        summary=EVIL,
        paper="javascript:alert(3)",
        authors='" onmouseover="alert(4)',
        arxiv="javascript:alert(5)",
        notes="{{ 7 * 7 }} <!-- <script>",
    )
    spec = "x.py:D" + EVIL
    return entry(spec, card=card, mergers=("ties", EVIL), credit="=HYPERLINK(1) " + EVIL,
                 certificates=(certificate(spec),))  # fmt: skip
