"""Entries can go down: a stronger attack, replayed here, is kept beside the standard score.

A recipe is a TOML file::

    attack = "gauge-align+finetune-recovery(per_class=4)"
    mergers = ["task-arithmetic"]      # all of the suite's if left out
    credit = "who found it"
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.core.records import Cell
from benchmark.pipeline.suite import Suite
from benchmark.reporting.board import TIERS, Tier
from leaderboard import trust
from leaderboard.certificates import MARGIN, best_known, lowers, protections, same_release
from leaderboard.checks import problems
from leaderboard.entry import Certificate, Entry, Line, Name, asked_of


class Recipe(BaseModel):
    """What to replay."""

    model_config = ConfigDict(extra="forbid")
    attack: Name
    mergers: tuple[Name, ...] = Field(default=(), max_length=20)
    credit: Line = Field(min_length=1)


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
        hint = did_you_mean(where, Recipe.model_fields) if "extra" in first["type"] else ""
        raise UsageError(f"{path}: {where}: {first['msg']}{hint}") from None


def replay(
    entry: Entry,
    recipe: Recipe,
    out: Path,
    *,
    trusted: Collection[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Run the recipe against the entry's release, on every victim, partner and seed of its suite.

    ``out`` is the run folder, which resumes. ``trusted``: specs of defenses whose own code may run.

    Raises:
        Untrusted: code that does not ship with UnmergeBench: the recipe's, or the defense's unless
            it is trusted.
        UnmergeBenchError: the entry is not sound, a cell failed, or the attack leaves no less
            protection than is known.
    """
    if wrong := problems(entry):
        raise UnmergeBenchError(f"the entry is not sound ({wrong[0]}); see `unmergebench verify`")
    attack = trust.attack(recipe.attack).spec
    mergers = tuple(trust.merger(spec).spec for spec in recipe.mergers)
    trust.defense(entry.defense.spec, trusted)
    suite = entry.suite.definition.model_copy(
        update={"attacks": (attack,), "mergers": mergers or entry.suite.definition.mergers}
    )
    cells = _run(asked_of(suite, entry.defense.spec), out, notify)
    made = Certificate(
        attack=attack,
        merger=", ".join(dict.fromkeys(cell.merger for cell in cells)),
        credit=recipe.credit,
        same_release=same_release(entry, cells),
        created=datetime.now(UTC).replace(microsecond=0),
        cells=tuple(cells),
    )
    if not lowers(entry, made):
        least = min(protections(cells, entry), default=None)
        tier: Tier = max((cell.access for cell in cells), key=TIERS.index)
        known = best_known(entry).get(tier)
        left, best = ("no figure" if v is None else f"{v:.2f}" for v in (least, known))
        raise UnmergeBenchError(
            f"{attack} leaves {left}; {best} is known with access {tier}, and a certificate needs "
            f"{MARGIN} less. Nothing was recorded"
        )
    return made


def _run(suite: Suite, out: Path, notify: Callable[[str], None]) -> list[Cell]:
    import torch

    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running

    device = torch.device("cpu")
    cells = running.execute(planning.make(suite, device), out, device, notify=notify)
    for cell in cells:
        if cell.status == "error":
            raise UnmergeBenchError(f"{cell.attack} failed on {cell.victim}: {cell.reason}")
    return cells
