"""``unmergebench leaderboard``. The package enters the command by its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Rankings across runs.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _group() -> None:
    """Rankings across runs."""


@app.command()
def show(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of one suite.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Rank the defenses of one or more runs of one suite, from all their cells together.

    Where two runs hold the same cell, the first that worked counts. Nothing is written.

    [bold]Examples[/bold]

      unmergebench leaderboard show runs/quick

      unmergebench leaderboard show runs/mine runs/theirs --json
    """
    from leaderboard.runs import board, combine

    cells = combine(runs)
    ranked = board(cells)
    if as_json:
        typer.echo(ranked.model_dump_json(indent=2))
        return
    from benchmark.reporting import tables

    tables.show(cells, ranked)
