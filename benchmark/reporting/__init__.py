"""From cells to what people read: leaderboard.json, plots, report.html, the console's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.core.paths import write_text
from benchmark.core.records import Cell

if TYPE_CHECKING:
    from benchmark.api.contracts import Card
    from benchmark.reporting.board import Leaderboard


def write(
    run_dir: Path,
    cells: Sequence[Cell],
    run: Mapping[str, Any],
    cards: Callable[[str], Card] | None = None,
) -> Leaderboard:
    """Write leaderboard.json, plots/*.png and report.html into a run folder, each atomically.

    All three are functions of ``cells`` (and, for the page's provenance and the papers' printed
    figures, of ``run``, the content of run.json). ``cards`` gives each defense's card; the
    registry's by default.
    """
    from benchmark.reporting import html, plots, ranking
    from benchmark.reporting.published import published_lines

    board = ranking.rank(cells, cards or ranking.card_of)
    board.published = published_lines(cells, run)
    write_text(run_dir / "leaderboard.json", board.model_dump_json(indent=2) + "\n")
    drawn = plots.write(run_dir / "plots", cells, board)
    write_text(run_dir / "report.html", html.page(cells, board, run, drawn, run_dir))
    return board
