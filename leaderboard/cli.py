"""``unmergebench leaderboard``. The package enters the command by its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leaderboard.paths import ENTRIES

app = typer.Typer(
    help="Rankings across runs, and the public page.", no_args_is_help=True, rich_markup_mode="rich"
)


@app.callback()
def _group() -> None:
    """Rankings across runs, and the public page."""


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


@app.command()
def build(
    entries: Annotated[
        Path, typer.Option("--entries", metavar="DIR", help="The folder of entries.")
    ] = ENTRIES,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the site goes; replaced whole.")
    ] = Path("site"),
) -> None:
    """Build the public page from the folder of entries: a static site that needs no network.

    Open DIR/index.html, or put DIR on any web host. Beside the page: leaderboard.csv, .parquet and
    .json, and entries.json. A folder that holds anything else is refused, and so are entries of one
    suite that contradict each other: one of the two is wrong.

    [bold]Examples[/bold]

      unmergebench leaderboard build

      unmergebench leaderboard build --entries my-entries --out public
    """
    from rich.markup import escape

    from benchmark.cli.output import console
    from leaderboard.shared import consistent
    from leaderboard.site import build as make

    with console(stderr=True).status("building"):
        consistent(entries)
        built = make(entries, out)
    console().print(
        f"{built.entries} entries of {built.defenses} defenses, {built.suites} suites: "
        f"{escape(str(built.page))}",
        soft_wrap=True,
    )


@app.command()
def serve(
    site: Annotated[
        Path, typer.Option("--site", metavar="DIR", help="A site that `build` made.")
    ] = Path("site"),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")
    ] = 8000,
) -> None:
    """Serve the built page to this machine only, until Ctrl-C.

    [bold]Examples[/bold]

      unmergebench leaderboard serve

      unmergebench leaderboard serve --site public --port 0
    """
    from leaderboard.site import serve as run

    run(site, port, typer.echo)
