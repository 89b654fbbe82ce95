"""The console: which defense survives which attack, at a glance and at 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.core.records import Cell
from benchmark.reporting.board import (
    BROKEN,
    GATE,
    HOLDS,
    STANDINGS,
    Entry,
    Leaderboard,
    Row,
    band,
)
from benchmark.reporting.published import PublishedLine
from benchmark.reporting.summary import TaskLine, attacks_of, scope, task_lines, verdict

LEGEND = (
    "protection: 1 = merging gains the free-rider nothing, 0 = as without a defense; "
    "below it, the 95 % interval"
)
# Blue against yellow and red, with a mark beside the colour: readable without seeing colours.
_STYLE = {"holds": "bold blue", "partly": "yellow", "broken": "bold red"}
_MARK = {"holds": "✓", "partly": "~", "broken": "✗"}
_MOST_ERRORS = 8


def short_interval(entry: Entry) -> str:
    """``.93–1``: no leading zeros, so that a matrix of intervals fits 80 columns."""
    return "–" if entry.interval is None else "–".join(_short(value) for value in entry.bounds)


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return {"0.00": "0", "1.00": "1"}.get(text, text.removeprefix("0"))


def protection_text(entry: Entry | None, *more: str) -> Text:
    """``0.97 ✓`` and its interval, below it or (with ``more`` lines) beside it; else the status."""
    if entry is None:
        return Text("·", "dim")
    if entry.status != "ok":
        style = "bold magenta" if entry.status == "error" else "dim"
        return Text(entry.status.replace("no-benefit", "no-\nbenefit"), style)
    kind = band(entry.shown)
    text = Text(f"{entry.shown:.2f} {_MARK[kind]}", _STYLE[kind])
    text.append(f"{' ' if more else chr(10)}{short_interval(entry)}", "dim not bold")
    for line in more:
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
                found = [protection_text(at.get((name, attack))) for attack in block]
                table.add_row(Text(_fold(name, first)), *found)
            parts.append(table)
    return parts


def _name(row: Row, width: int) -> Text:
    text = Text(_fold(row.defense, width), "bold" if row.standing == "ranked" else "")
    if row.standing != "ranked":
        text.append(f"\n({STANDINGS[row.standing]})", "dim not bold")
    return text


def ranking_table(board: Leaderboard, width: int = 80) -> Table:
    """Ranked methods, then those below the line, then what stands outside the ranking."""
    table = _table(spaced=True)
    several = len({entry.merger for entry in board.matrix}) > 1
    aware = any(row.robust_task_aware for row in board.rows)
    table.add_column(_header("#"), no_wrap=True)
    first = max(16, width // 5)
    table.add_column(_header("defense"), max_width=first, overflow="fold")
    table.add_column(_header("without\nattack"), no_wrap=True)
    for tier in board.tiers():
        table.add_column(_header(f"robust, attacker has\n{HOLDINGS[tier]}"), overflow="fold")
    if aware:
        table.add_column(_header("robust\ntask-aware"), overflow="fold")
    table.add_column(_header("points\nlost"), justify="right", no_wrap=True)
    taxed = any(row.benign for row in board.rows)
    if taxed:
        table.add_column(_header("benign\ntax"), justify="right", overflow="fold")
    table.add_column(_header("cost"), justify="right", no_wrap=True)
    for row in board.rows:
        found = [row.robust.get(tier) for tier in board.tiers()]
        if aware:
            found.append(row.robust_task_aware.get("labeled"))
        worst = [protection_text(e, *(_attained(e, several) if e else ())) for e in found]
        late = row.drop is not None and row.drop > GATE
        lost = Text("·" if row.drop is None else f"{row.drop:.1f}", "bold red" if late else "")
        costs = [lost, *([_tax(row)] if taxed else []), _cost(row)]
        table.add_row(row.place, _name(row, first), protection_text(row.unattacked), *worst, *costs)
    return table


def _tax(row: Row) -> Text:
    """Points, and after which use."""
    if row.tax is None:
        return Text("·")
    use, points = row.tax
    text = Text(f"{points:.1f}", "bold red" if points > GATE else "")
    if round(points, 1) > 0:
        text.append("\n" + "-\n".join(use.split("-")), "dim not bold")
    return text


def _cost(row: Row) -> Text:
    """Seconds of protecting, and the multiple of fine-tuning below."""
    seconds, multiple = row.protect_seconds, row.protect_multiple
    text = Text("<0.1 s" if seconds < 0.1 else f"{seconds:.1f} s")
    if multiple is not None:
        text.append("\n<0.01×" if multiple < 0.01 else f"\n{multiple:.2f}×", "dim not bold")
    return text


HOLDINGS = {"weights": "weights only", "unlabeled": "+ unlabeled data", "labeled": "+ labeled data"}


def _attained(entry: Entry, several: bool) -> list[str]:
    """Which attack and merger left so little."""
    return [entry.attacker, *([f"({entry.merger})"] if several else [])]


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
        text.append(f"{_MARK[kind]} {name}   ", _STYLE[kind])
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
    title = "Ranking by robust protection: the least over all attacks and mergers"
    parts += [Text(title, "bold"), ranking_table(board, width), *notes(board)]
    if board.published:
        title = "The papers' figures beside ours, at the same shared coefficient"
        parts += ["", Text(title, "bold"), published_table(board.published)]
    return Group(*parts)


def show(cells: Sequence[Cell], board: Leaderboard, console: Console | None = None) -> None:
    """Print ``render`` at the console's width."""
    console = console or Console()
    console.print(render(cells, board, console.width))
