"""Entries can go down: a stronger attack, replayed here, is kept beside the standard score.

A recipe is a TOML file::

    attack = "gauge-align+finetune-recovery(per_class=4)"
    mergers = ["task-arithmetic"]      # all of the suite's if left out
    credit = "who found it"
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmark.errors import UnmergeBenchError, UsageError
from benchmark.records import Cell
from benchmark.reporting.board import TIERS, Tier, clip
from leaderboard.checks import asked_of
from leaderboard.entry import Certificate, Entry, Line, Name


class Recipe(BaseModel):
    """What to replay."""

    model_config = ConfigDict(extra="forbid")
    attack: Name
    mergers: tuple[Name, ...] = ()
    credit: Line


def load(path: Path) -> Recipe:
    """A recipe from disk. Raises UsageError naming the first wrong field."""
    if not path.is_file():
        raise UsageError(f"no such recipe: {path}")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}") from None


def replay(
    entry: Entry,
    recipe: Recipe,
    out: Path,
    *,
    notify: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Run the recipe against the entry's release, on every victim, partner and seed of its suite.

    ``out`` is the run folder, which resumes.

    Raises:
        UnmergeBenchError: a cell failed, or the attack leaves no less protection than is known.
    """
    import torch

    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running

    suite = asked_of(entry.suite.definition, entry.defense.spec)
    suite = suite.model_copy(
        update={"attacks": (recipe.attack,), "mergers": recipe.mergers or suite.mergers}
    )
    device = torch.device("cpu")
    cells = running.execute(planning.make(suite, device), out, device, notify=notify)
    _check(cells)
    best = min(_protections(cells, entry), default=None)
    tier: Tier = max((cell.access for cell in cells), key=TIERS.index)
    known = best_known(entry).get(tier)
    if best is None or (known is not None and best >= known):
        found = "no benefit of merging" if best is None else f"{best:.2f}"
        raise UnmergeBenchError(
            f"{recipe.attack} leaves {found}, {known:.2f} is already known with access {tier}; "
            "nothing was recorded"
        )
    return Certificate(
        attack=cells[0].attack,
        merger=", ".join(dict.fromkeys(cell.merger for cell in cells)),
        credit=recipe.credit,
        same_release=_same_release(entry, cells),
        created=datetime.now(UTC).replace(microsecond=0),
        cells=tuple(cells),
    )


def best_known(entry: Entry) -> dict[Tier, float]:
    """The least protection by tier, over the suite's attacks and all certificates (clipped)."""
    found: dict[Tier, float] = {}
    for tier in TIERS:
        reach = TIERS[: TIERS.index(tier) + 1]
        values = [
            value
            for cells in (entry.cells, *(certificate.cells for certificate in entry.certificates))
            for value in _protections([c for c in cells if c.access in reach], entry)
        ]
        if values:
            found[tier] = min(values)
    return found


def _protections(cells: list[Cell] | tuple[Cell, ...], entry: Entry) -> list[float]:
    from leaderboard.runs import board

    if not cells:
        return []
    matrix = board(cells, lambda spec: entry.defense.card).matrix
    return [clip(e.protection) for e in matrix if e.protection is not None and not e.task_id]


def _check(cells: list[Cell]) -> None:
    for cell in cells:
        if cell.status == "error":
            raise UnmergeBenchError(f"{cell.attack} failed on {cell.victim}: {cell.reason}")


def _same_release(entry: Entry, cells: list[Cell]) -> bool:
    return all(
        cell.sha256.released == entry.subjects.released.get(f"{cell.victim}/{cell.seed}")
        for cell in cells
        if cell.status != "skipped"
    )
