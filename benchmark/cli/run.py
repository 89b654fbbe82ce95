"""``unmergebench run`` and ``unmergebench report``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from benchmark.api.contracts import Card
    from benchmark.conformance.marks import Mark
    from benchmark.core.records import Cell
    from benchmark.pipeline.run import Progress


#: Seconds after which a log without a terminal says what is being done.
QUIET = 10.0


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(report)


def run(
    suite: Annotated[str, typer.Argument(help="smoke, quick, standard, or a TOML file.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/SUITE.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    defense: Annotated[
        list[str] | None, typer.Option(help="Replaces the suite's; repeatable.")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Replaces the suite's; repeatable.")
    ] = None,
    merger: Annotated[
        list[str] | None, typer.Option(help="Replaces the suite's; repeatable.")
    ] = None,
    victim: Annotated[
        list[str] | None, typer.Option(help="Only these victims; repeatable.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Replaces the suite's; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, compute nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print leaderboard.json.")] = False,
) -> None:
    """Run a suite: every defense against every attack through every merger.

    Resumes where an interrupted run of the same suite stopped. Writes cells.jsonl,
    leaderboard.json, plots and report.html into the run folder.

    [bold]Examples[/bold]

      unmergebench run

      unmergebench run smoke --out runs/first

      unmergebench run --defense 'params(scaling=symmetric)' --defense my_file.py:MyDefense

      unmergebench run my-suite.toml --device cuda
    """
    from benchmark.conformance.marks import marks
    from benchmark.core import device as devices
    from benchmark.core.errors import Interrupted
    from benchmark.pipeline import plan as planning
    from benchmark.pipeline import run as running
    from benchmark.pipeline.suite import load

    start = time.perf_counter()
    asked = load(suite)
    chosen = planning.narrowed(
        asked,
        defenses=defense or (),
        attacks=attack or (),
        mergers=merger or (),
        victims=victim or (),
        seeds=seed or (),
    )
    where = devices.resolve(device)
    plan = planning.make(chosen, where)
    if out is None:
        out = Path("runs") / (
            chosen.name if chosen is asked else f"{chosen.name}-{chosen.hash[:8]}"
        )
    if dry_run:
        _show_plan(plan, out, as_json)
        return
    try:
        with _progress(f"{chosen.name} on {plan.testbed.spec}") as (progress, notify):
            checked = {"checks": marks((cell.at.defense.spec for cell in plan.cells), notify)}
            _warn(checked["checks"])
            cells = running.execute(
                plan, out, where, progress=progress, notify=notify, facts=checked
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what was finished is in {out}, the same command resumes"
        ) from None
    own = {planned.at.defense.spec: planned.at.defense.method.card for planned in plan.cells}
    _report(out, cells, as_json, own.__getitem__)
    if not as_json:
        print(f"\n{len(cells)} cells in {out} ({time.perf_counter() - start:.0f} s this time); "
              f"the page: {out / 'report.html'}")  # fmt: skip
    if any(cell.status == "error" for cell in cells):
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print leaderboard.json.")] = False,
) -> None:
    """Recompute every aggregate of a run from its cells; write its leaderboard, plots and page.

    [bold]Examples[/bold]

      unmergebench report runs/quick

      unmergebench report runs/quick --json
    """
    from benchmark.pipeline.run import judged_cells

    _report(folder, judged_cells(folder), as_json)


def _report(
    folder: Path,
    cells: list[Cell],
    as_json: bool,
    cards: Callable[[str], Card] | None = None,
) -> None:
    from benchmark import reporting
    from benchmark.pipeline.run import read_run
    from benchmark.reporting import tables

    board = reporting.write(folder, cells, read_run(folder), cards)
    if as_json:
        print(board.model_dump_json(indent=2))
    else:
        tables.show(cells, board)


def _warn(checked: Mapping[str, Mark]) -> None:
    """A line for each defense that failed its check: the run goes on, and says so here."""
    for spec, mark in checked.items():
        if not mark["passed"]:
            sys.stderr.write(
                f"{spec} fails its check ({', '.join(mark['failed'])}), so that no entry can be "
                f"made of it: unmergebench check defense '{spec}' says why\n"
            )


def _show_plan(plan: Any, out: Path, as_json: bool) -> None:
    rows = [
        {
            "victim": cell.at.group.victim,
            "partners": list(cell.at.group.partners),
            "seed": cell.at.seed,
            "defense": cell.at.defense.spec,
            "attack": cell.at.attack.spec,
            "merger": cell.at.merger.spec,
        }
        for cell in plan.cells
    ]
    if as_json:
        print(json.dumps({"suite": plan.suite.name, "out": str(out), "cells": rows}, indent=2))
        return
    for row in rows:
        print("{victim}+{partners} seed {seed}: {defense} × {attack} × {merger}".format(
            **{**row, "partners": "+".join(row["partners"])}))  # fmt: skip
    print(f"{len(rows)} cells of suite {plan.suite.name}, to be written to {out}")


@contextmanager
def _progress(title: str) -> Iterator[tuple[Progress, Any]]:
    """A bar with time left on a terminal; a line per finished cell elsewhere. Both on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    if not sys.stderr.isatty():
        started = said = time.perf_counter()

        def note(text: str) -> None:
            """What takes long is said now and then, so that a log shows life."""
            nonlocal said
            if time.perf_counter() - said > QUIET:
                said = time.perf_counter()
                sys.stderr.write(f"{text}\n")

        def line(done: int, total: int, cell: Cell | None) -> None:
            if cell is not None:
                result = cell.status if cell.protection is None else f"{cell.protection:.2f}"
                sys.stderr.write(
                    f"[{done}/{total}, {time.perf_counter() - started:.0f} s] {cell.victim}: "
                    f"{cell.defense} × {cell.attack} × {cell.merger}: {result}\n"
                )

        yield line, note
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
               TextColumn("[dim]{task.fields[doing]}"))  # fmt: skip
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(title, total=None, doing="")

        def advance(done: int, total: int, cell: Cell | None) -> None:
            bars.update(bar, completed=done, total=total)

        yield advance, lambda text: bars.update(bar, doing=text)
