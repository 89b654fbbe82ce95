"""The console: which defense survives which attack, at a glance and at 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.core.records import Cell
from benchmark.evaluation.thresholds import BROKEN, HOLDS
from benchmark.reporting import columns
from benchmark.reporting.board import TRACKS, Leaderboard, Row
from benchmark.reporting.published import PublishedLine
from benchmark.reporting.shown import MARKS, Shown, score
from benchmark.reporting.summary import TaskLine, attacks_of, scope, task_lines, verdict

LEGEND = (
    "protection: 1 = merging gains the free-rider nothing, 0 = as without a defense; "
    "below it, the 95 % interval"
)
# Blue against yellow and red, with a mark beside the colour: readable without seeing colours.
_STYLE = {"holds": "bold blue", "partly": "yellow", "broken": "bold red", "error": "bold magenta",
          "skipped": "dim", "no-benefit": "dim", "dim": "dim", "late": "bold red"}  # fmt: skip
_MOST_ERRORS = 8


def _interval(bounds: Sequence[float]) -> str:
    """``.93–1``: no leading zeros, so that a matrix of intervals fits 80 columns."""
    return "–".join(_short(value) for value in bounds) or "–"


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return {"0.00": "0", "1.00": "1"}.get(text, text.removeprefix("0"))


def shown_text(shown: Shown) -> Text:
    """``0.97 ✓`` with its interval, below it or (where more follows) beside it, then the rest."""
    mark = f" {MARKS[shown.kind]}" if shown.scored else ""
    words = shown.text.replace("no-benefit", "no-\nbenefit") + mark
    text = Text(words, _STYLE.get(shown.kind, ""))
    if shown.bounds is not None:
        text.append(f"{' ' if shown.below else chr(10)}{_interval(shown.bounds)}", "dim not bold")
    for line in shown.below:
        text.append(f"\n{line}", "dim not bold")
    return text


def _fold(spec: str, width: int) -> str:
    """A long spec breaks between its parts, not in the middle of a word."""
    lines = [""]
    for part in re.findall(r"[^(=,+]+[(=,+]*\s*", spec) or [spec]:
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _pieces(name: str) -> list[str]:
    """A name at its hyphens: ``weight-``, ``matching``."""
    return name.replace("-", "-\n").split("\n")


def _header(text: str, last: str = "") -> Text:
    header = Text(text, "bold")
    if last:
        header.append(f"\n{last}", "dim not bold")
    return header


def _table(spaced: bool = False) -> Table:
    padding = (0, 1, 1 if spaced else 0, 0)
    return Table(box=None, padding=padding, pad_edge=False, header_style="", show_edge=False)


def _blocks(names: Sequence[str], room: int) -> list[list[str]]:
    """Attacks in blocks, each as many as fit in ``room`` columns."""
    blocks: list[list[str]] = [[]]
    used = 0
    for name in names:
        need = max(7, *(len(piece) for piece in _pieces(name))) + 1
        if blocks[-1] and used + need > room:
            blocks.append([])
            used = 0
        blocks[-1].append(name)
        used += need
    return blocks


def matrices(board: Leaderboard, cells: Sequence[Cell], width: int) -> list[RenderableType]:
    """One matrix per testbed and merger: rows defenses, columns attacks (weakest access first)."""
    parts: list[RenderableType] = []
    order = [row.defense for row in board.rows]
    longest = max((len(name) for name in order), default=0)
    for testbed, merger in dict.fromkeys((e.testbed, e.merger) for e in board.matrix):
        at = {
            (e.defense, e.attack): e
            for e in board.matrix
            if (e.testbed, e.merger) == (testbed, merger)
        }
        attacks = attacks_of(at.values())
        first = max(len("defense ↓"), min(longest, max(16, width // 5)))
        rows = [name for name in order if any((name, attack) in at for attack in attacks)]
        title = Text(f"Merged by {merger}", "bold")
        title.append(f"  {scope(cells, testbed, merger)}", "not bold dim")
        parts += ["", title]
        for block in _blocks(list(attacks), width - first - 1):
            table = _table()
            corner = _header("defense ↓\nattack →", "access")
            table.add_column(corner, max_width=first, overflow="fold")
            for attack in block:
                table.add_column(
                    _header("\n".join(_pieces(attack)), attacks[attack]), overflow="fold"
                )
            for name in rows:
                found = [shown_text(score(at.get((name, attack)), missing="·")) for attack in block]
                table.add_row(Text(_fold(name, first)), *found)
            parts.append(table)
    return parts


def ranking_table(board: Leaderboard, rows: Sequence[Row], width: int = 80) -> Table:
    """Ranked methods, then those below the line, then what stands outside the ranking."""
    table = _table(spaced=True)
    first = max(16, width // 5)
    shown = columns.of_view("console", board)
    for column in shown:
        if column.name == "defense":
            table.add_column(_header(column.short), max_width=first, overflow="fold")
        else:
            justify: JustifyMethod = "right" if column.number else "left"
            narrow = not column.access and column.name != "tax"
            table.add_column(
                _header(column.short), justify=justify, no_wrap=narrow, overflow="fold"
            )
    for row in rows:
        table.add_row(*(_cell(column, row, first) for column in shown))
    return table


def _cell(column: columns.Column, row: Row, width: int) -> Text:
    shown = column.show(row)
    if column.name != "defense":
        return shown_text(shown)
    text = Text(_fold(shown.text, width), "bold" if row.standing == "ranked" else "")
    for line in shown.below:
        text.append(f"\n({line})", "dim not bold")
    return text


def notes(board: Leaderboard) -> list[Text]:
    """One line per method on what breaks it, then missing ranks, flags and errors."""
    lines = []
    for row in board.rows:
        if row.role == "method":
            lines.append(Text.assemble((row.defense, "bold"), f": {verdict(row)}"))
    flagged = [(row.defense, row.flags) for row in board.rows]
    flagged += [(f"attack {name}", flags) for name, flags in board.attack_flags.items()]
    for name, flags in flagged:
        if flags:
            lines.append(Text(f"flags of {name}: {', '.join(flags)}", "yellow"))
    errors = [entry for entry in board.matrix if entry.status == "error"]
    for entry in errors[:_MOST_ERRORS]:
        why = entry.reasons[0] if entry.reasons else "no reason recorded"
        lines.append(
            Text(f"error in {entry.defense}, {entry.attack}, {entry.merger}: {why}", "magenta")
        )
    if len(errors) > _MOST_ERRORS:
        lines.append(Text(f"and {len(errors) - _MOST_ERRORS} more with errors", "magenta"))
    return lines


def task_table(lines: Sequence[TaskLine]) -> Table:
    """Accuracy per task, in %: what there was to gain."""
    table = _table()
    table.add_column(_header("task"), overflow="fold")
    table.add_column(_header("zero-shot"), justify="right")
    table.add_column(_header("expert"), justify="right")
    mergers = list(dict.fromkeys(merger for line in lines for merger in line.merged))
    for merger in mergers:
        table.add_column(_header(merger), justify="right", overflow="fold")
    for line in lines:
        merged = [_percent(line.merged.get(merger)) for merger in mergers]
        table.add_row(Text(line.label), _percent(line.zero_shot), _percent(line.expert), *merged)
    return table


def _percent(value: float | None) -> str:
    return "·" if value is None else f"{100 * value:.1f}"


def published_table(lines: Sequence[PublishedLine]) -> Table:
    """The papers' figures beside ours: ``printed | measured``, accuracy in %."""
    table = _table()
    table.add_column(_header("printed | measured, %"), ratio=1, overflow="fold")
    for which in ("unprotected", "protected", "attacked"):
        table.add_column(_header(which), justify="right", no_wrap=True)
    table.add_column(_header("arXiv"), overflow="fold")
    for line in lines:
        name = Text(line.label)
        if line.remark:
            name.append(f"\n{line.remark}", "dim not bold")
        pairs = [_pair(line, which) for which in ("unprotected", "protected", "attacked")]
        origin = Text(f"{line.printed.arxiv}\n")
        origin.append(f"[{line.printed.evidence}]", "dim not bold")
        table.add_row(name, *pairs, origin)
    return table


def _pair(line: PublishedLine, which: str) -> str:
    printed, measured = getattr(line.printed, which), getattr(line.measured, which)
    if printed is None:
        return "·"
    return f"{printed:.1f} | {'·' if measured is None else f'{measured:.1f}'}"


def _key() -> Text:
    names = {"holds": f"holds (≥ {HOLDS})", "partly": "partly", "broken": f"broken (< {BROKEN})"}
    text = Text()
    for kind, name in names.items():
        text.append(f"{MARKS[kind]} {name}   ", _STYLE[kind])
    return text


def render(cells: Iterable[Cell], board: Leaderboard, width: int = 80) -> RenderableType:
    """Everything that ``unmergebench run`` prints at its end: tasks, matrices, ranking, notes,
    and the papers' figures where the suite has some.
    """
    cells = list(cells)
    if not cells:
        return Text("no cells yet")
    parts: list[RenderableType] = []
    if lines := task_lines(cells):
        parts += [Text("Test accuracy without any defense, %", "bold"), task_table(lines)]
    parts += matrices(board, cells, width)
    parts += [Text(LEGEND, "dim"), _key(), ""]
    for track, title in TRACKS.items():
        if rows := [row for row in board.rows if row.track == track]:
            parts += [Text(title, "bold"), ranking_table(board, rows, width)]
    parts += notes(board)
    if board.published:
        title = "The papers' figures beside ours, at the same shared coefficient"
        parts += ["", Text(title, "bold"), published_table(board.published)]
    return Group(*parts)


def show(cells: Sequence[Cell], board: Leaderboard, console: Console | None = None) -> None:
    """Print ``render`` at the console's width."""
    console = console or Console()
    console.print(render(cells, board, console.width))
