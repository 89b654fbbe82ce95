"""What the commands share: tables, ``--json``, progress with time left, common options."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all randomness.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint in --out.")]
BaseHead = Annotated[
    str | None,
    typer.Option(
        "--base-head",
        metavar="expert",
        help="Give the base the expert's head: for a base that has another head, or none.",
    ),
]
Partial = Annotated[
    bool,
    typer.Option(
        "--partial", help="Go on where a part of the model is covered by no row of the anatomy."
    ),
]
AsAdapter = Annotated[
    bool | None,
    typer.Option(
        "--adapter/--no-adapter",
        help="Write a LoRA adapter (PEFT folder), or a whole model; "
        "default: an adapter where adapters were given and one can hold the result.",
        show_default=False,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", min=1, help="Rank of the adapter that is written; default: loses nothing."
    ),
]

_PIPE_WIDTH = 120  # where there is no terminal to ask


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; wide enough for tables when piped."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH)


def print_json(data: Any) -> None:
    """``data`` as indented JSON on stdout. NaN and infinity, which JSON lacks, become null."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only, default=str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain text: brackets in a cell are no markup."""
    made = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def facts(title: str, pairs: Sequence[tuple[str, object]]) -> Table:
    """Names beside values, without a frame."""
    made = Table(title=title or None, title_justify="left", show_header=False, box=None)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(escape(name), escape(str(value)))
    return made


def progress() -> Progress:
    """Bars on stderr with counts, time spent and time left; gone when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )


class Steps:
    """A bar over named steps: ``steps("writing")`` ends the step before and begins the next."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=total)
        self._begun = False

    def __call__(self, name: str) -> None:
        self._bar.update(self._task, description=escape(name), advance=int(self._begun))
        self._begun = True


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """A :class:`Steps` bar for a command of ``total`` steps."""
    with progress() as bar:
        yield Steps(bar, total)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
