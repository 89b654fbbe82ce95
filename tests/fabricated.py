"""Fabricated but plausible cells for the tests of reports: no result is measured here."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from benchmark.api.contracts import Card
from benchmark.core.records import SCHEMA_VERSION, Cell, Seconds, Spent
from benchmark.evaluation import soundness
from benchmark.evaluation.statistics import pack_bits

LABELED = {"finetune-recovery"}
UNLABELED = {"layer-refit"}
ROLES = {"none": "reference", "oracle": "control", "noise": "control"}
SUITE = {"name": "made-up", "hash": "0" * 64, "description": "fabricated cells for a test"}
RUN = {
    "schema_version": SCHEMA_VERSION,
    "suite": SUITE,
    "environment": {"python": "3.12", "platform": "Linux"},
    "packages": {"torch": "2.15", "numpy": "2"},
    "git": {"commit": "f" * 40, "dirty": False},
    "device": "cpu",
    "seeds": [0],
    "created": "2030-01-01T00:00:00Z",
    "seconds": 12.5,
}
EXPERT = {"r8": 0.94, "bbc": 0.95}
ZERO_SHOT = {"r8": 0.44, "bbc": 0.71}
UNDEFENDED = {"r8": 0.92, "bbc": 0.93}
#: G0 with the undefended expert as release: both experts alone do worse.
REFERENCE = {"r8": 0.60, "bbc": 0.90}
#: Where merging the undefended expert gains nothing, and where only this release leaves nothing.
NO_BENEFIT = {"outside": UNDEFENDED, "reference": UNDEFENDED}
EMPTIED = {"outside": UNDEFENDED}


def cards(spec: str) -> Card:
    name = spec.split("(")[0]
    return Card(summary=spec, exact=name in ("params", "mergelock"), role=ROLES.get(name, "method"))


def outcomes(accuracy: float, n: int, rng: np.random.Generator) -> str:
    """Exactly round(accuracy·n) right answers, on random examples."""
    right = np.zeros(n, dtype=bool)
    right[rng.permutation(n)[: round(min(accuracy, 1.0) * n)]] = True
    return pack_bits(right)


def cell(
    defense: str = "params",
    attack: str = "none",
    merger: str = "task-arithmetic",
    protection: float = 0.0,
    *,
    seed: int = 0,
    n: int = 500,
    utility: float = 0.94,
    gap: float = 1e-6,
    outside: dict[str, float] = REFERENCE,
    reference: dict[str, float] = REFERENCE,
    **fields: object,
) -> Cell:
    """A cell on r8 (victim) and bbc whose attacked model lies that far from the undefended one.

    ``outside`` and ``reference``: accuracies of the best without merging the release, and without
    merging the undefended expert.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{defense}|{attack}|{merger}".encode())])
    attacked = {t: UNDEFENDED[t] + protection * (outside[t] - UNDEFENDED[t]) for t in EXPERT}
    models = {
        "undefended": UNDEFENDED,
        "outside": outside,
        "expert": EXPERT,
        "attacked": attacked,
    }
    correct = {
        model: {task: outcomes(value, n, rng) for task, value in accuracy.items()}
        for model, accuracy in models.items()
    }
    same = outside == reference
    correct["reference"] = (
        correct["outside"] if same else {t: outcomes(v, n, rng) for t, v in reference.items()}
    )
    correct["base"] = {task: outcomes(value, n, rng) for task, value in ZERO_SHOT.items()}
    correct["released"] = {"r8": outcomes(utility, n, rng)}
    made: dict[str, object] = {
        "key": f"{defense}|{attack}|{merger}|{seed}",
        "testbed": "minilm",
        "victim": "r8",
        "partners": ["bbc"],
        "seed": seed,
        "defense": defense,
        "attack": attack,
        "merger": merger,
        "access": "labeled"
        if attack in LABELED
        else "unlabeled"
        if attack in UNLABELED
        else "weights",
        "outside_choice": "base" if same else "released alone",
        "fixed": {"0.3": {"r8": 0.5, "bbc": 0.9}, "0.8": {"r8": 0.7, "bbc": 0.8}},
        "standalone": round(utility * n) / n,
        "logit_gap": gap,
        "correct": correct,
        "n_val": 200,
        "n_test": n,
        "seconds": Seconds(protect=0.4, recover=0.2),
        "budget": Spent(examples=128 if attack in LABELED else 0),
    }
    figures = soundness.follows(Cell(**made))  # type: ignore[arg-type]
    made |= {**figures, "merged_accuracy": figures["accuracy"]}
    return Cell(**{**made, **fields})  # type: ignore[arg-type]


def modules(defense: str = "foreign", protection: float = 0.9, **fields: object) -> list[Cell]:
    """A release with modules of its own under what is mandatory for such."""
    more: dict[str, object] = {"changes_modules": True, "seen": 0.95, **fields}
    return [
        cell(defense, attack, protection=protection, **more)  # type: ignore[arg-type]
        for attack in ("none", "read-shipped", "layer-refit")
    ]


def counted(expert: int, released: int, n: int = 200, **fields: object) -> Cell:
    """A cell whose expert and release get so many of ``n`` of the victim's examples right."""
    rng = np.random.default_rng([expert, released])
    made = cell(n=n, **fields)  # type: ignore[arg-type]
    made.correct["expert"]["r8"] = outcomes(expert / n, n, rng)
    made.correct["released"] = {"r8": outcomes(released / n, n, rng)}
    made.utility = released / n
    return made


ATTACKS = (
    "none",
    "weight-matching",
    "head-norm",
    "aga",
    "gauge-align",
    "dropout-pruning",
    "finetune-recovery",
)
STRENGTH = {
    "none": (0, 0, 0, 0, 0, 0.1, 0),
    "oracle": (1, 1, 1, 1, 0.98, 1, 0.96),
    "noise": (0.2, 0.2, 0.2, 0.2, 0.2, 0.3, 0.15),
    "params": (0.99, 0.8, 0.85, 0.4, 0.02, 0.9, 0.7),
    "params(scaling=symmetric)": (1.0, 0.95, 0.97, 0.6, 0.01, 0.9, 0.72),
    "mergelock": (1.02, 0.99, 0.97, 0.1, 0.0, 0.93, 0.69),
    "trap": (0.75, 0.75, 0.74, 0.73, 0.72, 0.6, 0.55),
}


def suite(mergers: tuple[str, ...] = ("task-arithmetic", "ties"), n: int = 500) -> list[Cell]:
    """A whole run's worth of cells, with one error."""
    cells = []
    for merger in mergers:
        for defense, values in STRENGTH.items():
            for attack, value in zip(ATTACKS, values, strict=True):
                utility = 0.90 if defense in ("oracle", "noise") else 0.94
                more: dict[str, object] = {}
                if (defense, attack, merger) == ("mergelock", "aga", "ties"):
                    more = {"status": "error", "reason": "MethodError: NaN in recovered weights"}
                cells.append(cell(defense, attack, merger, value, n=n, utility=utility, **more))
    return cells


def save(folder: Path, cells: list[Cell], **facts: object) -> Path:
    """A run folder with these cells."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({**RUN, **facts}), encoding="utf-8")
    lines = "".join(one.model_dump_json() + "\n" for one in cells)
    (folder / "cells.jsonl").write_text(lines, encoding="utf-8")
    return folder
