"""A small entry of fabricated cells: no result is measured here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fabricated import EXPERT, cell

from benchmark.api.methods import defense
from benchmark.core.records import Cell, Hashes, Search
from benchmark.evaluation.scoring import accuracies, gain, normalized, protection
from benchmark.evaluation.statistics import pack_bits, ratio_protection, unpack_bits
from benchmark.pipeline.suite import Suite
from leaderboard import checks
from leaderboard.entry import Entry, Method, Subjects, SuiteId

SHA = {"base": "1" * 64, "expert": "2" * 64, "released": "3" * 64, "recovered": "3" * 64}


def suite(spec: str = "mergelock") -> Suite:
    """One cell for each of two mergers."""
    return Suite(
        name="tiny",
        description="for a test",
        testbed="minilm",
        groups=({"victim": "r8", "partners": ("bbc",)},),
        defenses=(spec,),
        attacks=("none",),
        mergers=("task-arithmetic", "ties"),
        test=20,
    )


def small(spec: str = "mergelock", name: str = "mergelock", **fields: Any) -> Entry:
    """An entry about ``spec`` with the card of the defense ``name``, sound under ``suite()``."""
    cells = tuple(_sound(cell(spec, merger=m, protection=0.8, n=20)) for m in suite().mergers)
    asked, card = suite(spec), defense(name).method.card
    made = {
        "version": "tiny-1",
        "suite": SuiteId(name="tiny", hash=asked.hash, definition=asked),
        "defense": Method(spec=spec, card=card, source_sha256="4" * 64),
        "subjects": Subjects(
            testbed="minilm",
            data="5" * 64,
            base=SHA["base"],
            experts={"r8": SHA["expert"]},
            released={"r8/0": SHA["released"]},
        ),
        "cells": cells,
        "environment": {"device": "cpu"},
        "flags": tuple(checks.flags(cells, spec, lambda spec: card)),
        "created": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return Entry(**{**made, **fields})


def _sound(one: Cell) -> Cell:
    """The cell with every figure as it follows from its outcomes."""
    expert = pack_bits([True] * 19 + [False])
    correct = {**one.correct, "expert": dict.fromkeys(EXPERT, expert)}
    bits = {w: {t: unpack_bits(x) for t, x in o.items()} for w, o in correct.items()}
    gains = {w: gain(bits[w], bits["expert"]) for w in ("attacked", "undefended", "outside")}
    own, found = accuracies(bits["expert"]), accuracies(bits["attacked"])
    changes = {
        "correct": correct,
        "accuracy": found,
        "merged_accuracy": found,
        "expert_accuracy": own,
        "normalized": normalized(found, own),
        "gain": gains["attacked"],
        "gain_undefended": gains["undefended"],
        "gain_outside": gains["outside"],
        "protection": protection(*gains.values()),
        "protection_ci": ratio_protection(correct, scope="minilm").interval,
        "zero_shot": {"r8": 0.45, "bbc": 0.7},
        "utility": 0.95,
        "utility_drop": own["r8"] - 0.95,
        "standalone": 0.95,
        "fixed": {},
        "qk_gauge": "general",
        "sha256": Hashes(**SHA),
        "search": Search(settings=4, passes=8, exhaustive=16),
    }
    return one.model_copy(update=changes)
