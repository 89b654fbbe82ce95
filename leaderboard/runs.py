"""Several runs of one suite put together, always from their cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.core.records import Cell
from benchmark.reporting.board import Leaderboard, Row
from benchmark.reporting.columns import FIELDS

if TYPE_CHECKING:
    import pandas as pd

    from benchmark.api.contracts import Card

Cards = Callable[[str], "Card"]


class Run(NamedTuple):
    """A run folder: where, its run.json, its cells."""

    folder: Path
    facts: dict[str, Any]
    cells: list[Cell]

    @property
    def suite_hash(self) -> str:
        """Content hash of its suite; empty where run.json has none."""
        return str((self.facts.get("suite") or {}).get("hash") or "")


def read(path: Path) -> Run:
    """A run folder from disk.

    Raises:
        UnmergeBenchError: no run there, or a damaged one.
    """
    from benchmark.pipeline.run import judged_cells, read_run

    return Run(path, read_run(path), judged_cells(path))


def combine(paths: Sequence[Path]) -> list[Cell]:
    """The cells of runs of one suite; of a cell that several runs hold, the first that worked.

    Raises:
        UsageError: no run given, or runs of different suites.
        UnmergeBenchError: a run is missing or damaged.
    """
    runs = [read(path) for path in paths]
    if not runs:
        raise UsageError("no run given; name at least one run folder")
    for run in runs:
        if not run.suite_hash:
            raise UnmergeBenchError(f"{run.folder}/run.json names no suite hash; run it again")
        if run.suite_hash != runs[0].suite_hash:
            raise UsageError(
                f"{runs[0].folder} and {run.folder} ran different suites "
                f"({runs[0].suite_hash[:12]} and {run.suite_hash[:12]}); compare runs of one suite"
            )
    return _distinct(cell for run in runs for cell in run.cells)


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    kept: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        where = (cell.testbed, cell.victim, tuple(cell.partners), cell.seed, cell.defense,
                 cell.attack, cell.merger)  # fmt: skip
        if where not in kept or (kept[where].status == "error" and cell.status != "error"):
            kept[where] = cell
    return list(kept.values())


def load_runs(paths: Iterable[str | Path], cards: Cards | None = None) -> pd.DataFrame:
    """One row per defense of each run, in the order of its ranking (see ``COLUMNS``).

    Protections are raw, in points of 1; ``drop`` in points of accuracy. Where there is no value,
    NaN or None. ``cards`` gives each defense's card; the registry's by default.
    """
    import pandas as pd

    rows = []
    for path in map(Path, paths):
        run = read(path)
        suite = run.facts.get("suite") or {}
        for row in board(run.cells, cards).rows:
            rows.append({"run": str(path), "suite": suite.get("name"), **record(row)})
    return pd.DataFrame(rows, columns=["run", "suite", *COLUMNS])


def board(cells: Iterable[Cell], cards: Cards | None = None) -> Leaderboard:
    """The leaderboard of these cells."""
    from benchmark.reporting.ranking import card_of, rank

    return rank(cells, cards or card_of)


#: Of the table of :mod:`benchmark.reporting.columns`, flat.
COLUMNS = tuple(field.name for field in FIELDS)


def record(row: Row) -> dict[str, Any]:
    """A ranking row as flat values, one per column of ``COLUMNS``."""
    return {field.name: field.value(row) for field in FIELDS}
