"""Entries of made-up cells in which everything fits: no result is measured here.

Models are right on the easier examples first, each with a taste of its own, so that two of them
agree on most examples as real ones do.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np

from benchmark.api import methods
from benchmark.api.contracts import Ensemble
from benchmark.core.records import Cell, Hashes, Search, Spent
from benchmark.evaluation.flags import of_cell
from benchmark.evaluation.scoring import Gains, accuracies, gain, normalized
from benchmark.evaluation.statistics import pack_bits, ratio_protection, unpack_bits
from benchmark.pipeline.suite import Suite
from leaderboard import checks
from leaderboard.entry import Entry, Method, Subjects, SuiteId

SHA = {"base": "1" * 64, "expert": "2" * 64, "released": "3" * 64}
VICTIM, PARTNER = "r8", "bbc"
#: Accuracy on the victim's and the partner's task.
MODELS = {
    "expert": (0.95, 0.94),
    "undefended": (0.92, 0.93),
    "outside": (0.60, 0.92),
    "base": (0.45, 0.70),
}
ATTACKS = (
    "none", "weight-matching", "head-norm", "aga", "gauge-align", "dropout-pruning",
    "finetune-recovery", "auto",
)  # fmt: skip
MERGERS = ("task-arithmetic", "task-arithmetic(fixed=0.8)", "ties")


def suite(
    spec: str = "mergelock",
    *,
    attacks: tuple[str, ...] = ("none",),
    mergers: tuple[str, ...] = ("task-arithmetic", "ties"),
    n: int = 20,
) -> Suite:
    """One cell for each attack and merger."""
    return Suite(
        name="tiny",
        description="for a test",
        testbed="minilm",
        groups=({"victim": VICTIM, "partners": (PARTNER,)},),
        defenses=(spec,),
        attacks=attacks,
        mergers=mergers,
        test=n,
        fixed_coefficients=(0.8,),
    )


def wide(spec: str = "mergelock") -> Suite:
    """24 cells of 300 examples a task, as `smoke` has."""
    return suite(spec, attacks=ATTACKS, mergers=MERGERS, n=300)


@cache
def outcomes(accuracy: float, n: int, task: str, model: str) -> str:
    """Packed outcomes, right on exactly round(accuracy·n) examples."""
    hard = np.random.default_rng(zlib.crc32(task.encode())).random(n)
    taste = np.random.default_rng(zlib.crc32(f"{model}|{task}".encode())).normal(0, 0.04, n)
    right = np.zeros(n, dtype=bool)
    right[np.argsort(hard + taste)[: round(accuracy * n)]] = True
    return pack_bits(right)


def cell(asked: Suite, spec: str, attack: str, merger: str, protection: float = 0.8) -> Cell:
    """A cell of a defense that leaves so much protection, with every figure as it follows."""
    card = methods.defense(spec).method.card if spec in methods.DEFENSES.entries else CARD
    work, merging = methods.attack(attack).method, methods.merger(merger).method
    tasks, n = (VICTIM, PARTNER), asked.test
    free = work.access == 0
    names = {
        "undefended": f"undefended {attack} {merger}",
        "outside": f"partners {merger}" if free else f"partners {attack} {merger}",
        "attacked": f"{spec} {attack} {merger}",
    }
    attacked = [
        (1 - protection) * u + protection * o
        for u, o in zip(MODELS["undefended"], MODELS["outside"], strict=True)
    ]
    accuracy = {**MODELS, "attacked": attacked, "reference": MODELS["outside"]}
    names["reference"] = names["outside"]
    correct = {
        who: {
            task: outcomes(share, n, task, names.get(who, who))
            for task, share in zip(tasks, shares, strict=True)
        }
        for who, shares in accuracy.items()
    }
    correct["released"] = {VICTIM: outcomes(0.95, n, VICTIM, spec)}
    labelled = getattr(work, "per_class", 0) if not free else 0
    ensemble = isinstance(work, Ensemble)
    made = Cell(
        key=f"{spec}|{attack}|{merger}",
        testbed=asked.testbed,
        victim=VICTIM,
        partners=[PARTNER],
        seed=0,
        defense=spec,
        attack=attack,
        merger=merger,
        access=max(work.access, merging.access).label,
        setting={"coefficients": [0.8, 0.8]},
        merged_setting={"coefficients": [0.8, 0.8]},
        choice="merge",
        outside_choice="partners",
        standalone=0.95,
        fixed={"0.8": {VICTIM: 0.65}} if attack == "none" else {},
        qk_gauge="general",
        logit_gap=2e-6,
        bf16_gap=0.002,
        bf16_gap_expert=0.002,
        recovered_gap=0.0 if attack == "none" else 1e-5,
        ensemble={"version": work.version, "winner": work.candidates[0]} if ensemble else {},
        correct=correct,
        n_val=64,
        n_test=n,
        sha256=Hashes(**SHA, recovered=SHA["released"] if attack == "none" else "4" * 64),
        budget=Spent(examples=10 * labelled, per_class=labelled, steps=10, flops=1e9 * labelled),
        search=Search(settings=4, passes=8, exhaustive=16),
    )
    return follow(made, card)


CARD = methods.defense("mergelock").method.card


def follow(one: Cell, card: Any = CARD) -> Cell:
    """The cell with every figure as it follows from its outcomes."""
    bits = {w: {t: unpack_bits(x) for t, x in o.items()} for w, o in one.correct.items()}
    gains = Gains(*(gain(bits[who], accuracies(bits["expert"])) for who in Gains._fields[:4]))
    own, found = accuracies(bits["expert"]), accuracies(bits["attacked"])
    utility = float(bits["released"][one.victim].mean())
    left = gains.protection
    interval = None if left is None else ratio_protection(one.correct, scope=one.testbed).interval
    changed = one.model_copy(
        update={
            "status": gains.status,
            "accuracy": found,
            "merged_accuracy": found if one.choice == "merge" else {},
            "expert_accuracy": own,
            "zero_shot": accuracies(bits["base"]),
            "normalized": normalized(found, own),
            "gain": gains.attacked,
            "gain_undefended": gains.undefended,
            "gain_outside": gains.outside,
            "gain_reference": gains.reference,
            "protection": left,
            "protection_ci": interval,
            "utility": utility,
            "utility_drop": own[one.victim] - utility,
            "standalone": utility if one.attack == "none" else one.standalone,
        }
    )
    return changed.model_copy(update={"flags": of_cell(changed, card, growth=math.nan)})


def made(asked: Suite, strength: Mapping[tuple[str, str], float] | float = 0.8,
         **fields: Any) -> Entry:  # fmt: skip
    """An entry that answers ``asked``; ``strength``: protection by attack and merger, or of all."""
    (spec,) = asked.defenses
    cells = tuple(
        cell(asked, spec, attack, merger,
             strength if isinstance(strength, float) else strength[attack, merger])
        for attack in asked.attacks
        for merger in asked.mergers
    )  # fmt: skip
    card = methods.defense(spec).method.card if spec in methods.DEFENSES.entries else CARD
    builtin = spec in methods.DEFENSES.entries
    digest = methods.DEFENSES.fingerprint(spec) if builtin else "4" * 64
    known = {
        "version": f"{asked.name}-1",
        "suite": SuiteId(name=asked.name, hash=asked.hash, definition=asked),
        "defense": Method(spec=spec, card=card, source_sha256=digest),
        "subjects": Subjects(
            testbed=asked.testbed,
            data="5" * 64,
            base=SHA["base"],
            experts={VICTIM: SHA["expert"]},
            released={f"{VICTIM}/0": SHA["released"]},
        ),
        "cells": cells,
        "environment": {"device": "cpu"},
        "flags": tuple(checks.flags(cells, spec, lambda spec: card)),
        "created": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return Entry(**{**known, **fields})


def small(spec: str = "mergelock", **fields: Any) -> Entry:
    """An entry of two cells about ``spec``, sound under ``suite()``."""
    return made(suite(spec), **fields)


def commands() -> None:
    """The commands of the leaderboard, added to the program as the entry point adds them, once."""
    from benchmark.cli import app
    from leaderboard.commands import register

    if not any(c.callback and c.callback.__name__ == "verify" for c in app.registered_commands):
        register(app)
