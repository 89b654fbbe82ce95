"""The HTML: every string escaped, invisible characters shown, links only where they are safe."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from benchmark.core.errors import UnmergeBenchError
from benchmark.evaluation.flags import FLAGS
from benchmark.pipeline.suite import builtin
from benchmark.reporting.board import STANDINGS, TRACKS, Leaderboard, Row
from benchmark.reporting.columns import TERMS
from benchmark.reporting.costs import break_curves
from benchmark.reporting.drawn import drawn
from benchmark.reporting.html import two
from benchmark.reporting.plots import BLUE, PALE, VERMILION
from benchmark.reporting.shown import MARKS, percent, score
from benchmark.reporting.summary import attacks_of, fixed_lines, verdict
from leaderboard.site import figures
from leaderboard.site.collect import Listed, Question
from leaderboard.site.columns import ACCESSES, COLUMNS, SUMMARY, Answer
from leaderboard.strict import UNSEEN

_ARXIV = re.compile(r"^(\d{4}\.\d{4,5}|[a-z.-]+/\d{7})(v\d+)?$", re.ASCII)


def href(url: str) -> str | None:
    """``url`` if it is an absolute http or https address, else None."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return url if parts.scheme in ("http", "https") and parts.netloc else None


def seen(value: object) -> object:
    """Text with a visible sign where a character is invisible or turns the text around."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNSEEN.sub("\ufffd", value)
    return value


def index(questions: Sequence[Question], gone: Sequence[Listed], pages: dict[str, str]) -> str:
    """The page with the table. ``gone``: entries that no longer count."""
    script = table_script()
    answers = [
        Answer(question, row, listed, quote(pages[listed.spec]))
        for question in questions
        for row, listed in question.rows
    ]
    rows = [(answer, [column.show(answer) for column in COLUMNS]) for answer in answers]
    measured = [
        {c.access for c, shown in zip(COLUMNS, cells, strict=True) if c.access and shown.scored}
        for _, cells in rows
    ]
    return _environment().get_template("index.html.j2").render(
        columns=COLUMNS,
        terms=TERMS,
        accesses=[(access, any(access in one for one in measured)) for access in ACCESSES],
        questions=questions,
        rows=[(*row, one) for row, one in zip(rows, measured, strict=True)],
        gone=gone,
        pages=pages,
        scatters=[(asked, figures.scatter(asked.board, asked.id)) for asked in questions],
        script=script,
        policy=f"'sha256-{_digest(script)}'",
        home="",
    )  # fmt: skip


def defense(
    spec: str, versions: Sequence[Listed], questions: Sequence[Question], pages: dict[str, str]
) -> str:
    """The page of one defense. ``versions``: all its entries, whether they count or not."""
    standing = [
        _answer(Answer(question, row, listed, ""))
        for question in questions
        for row, listed in question.rows
        if listed.spec == spec
    ]
    newest = max(versions, key=lambda listed: listed.entry.created)
    return _environment().get_template("defense.html.j2").render(
        spec=spec,
        card=newest.entry.defense.card,
        answers=standing,
        versions=versions,
        pages=pages,
        policy="'none'",
        home="../",
    )  # fmt: skip


def _answer(answer: Answer) -> dict[str, Any]:
    """What one entry says under one suite."""
    question, row, listed, _ = answer
    own = Leaderboard(
        rows=[row], matrix=[e for e in question.board.matrix if e.defense == row.defense]
    )
    order = [row.defense]
    fixed = fixed_lines(listed.entry.cells, order)
    return {
        "question": question,
        "row": row,
        "listed": listed,
        "verdict": verdict(row),
        "summary": [(column, column.show(answer)) for column in SUMMARY],
        "place": _place(row),
        "matrices": [_matrix(own, name) for name in dict.fromkeys(e.testbed for e in own.matrix)],
        "break_cost": figures.break_cost(own, question.id),
        "breaking": [_points(own, x) for x in ("per_class", "flops")],
        "drawn": drawn(listed.entry.cells),
        "fixed": fixed,
        "curve": figures.coefficient_curve(fixed, question.id),
        "commands": commands(listed),
        "troubles": [cell for cell in listed.entry.cells if cell.status != "ok"],
    }


def _matrix(board: Leaderboard, testbed: str) -> dict[str, Any]:
    """Attacks × mergers of one defense."""
    own = [entry for entry in board.matrix if entry.testbed == testbed]
    at = {(entry.attack, entry.merger): entry for entry in own}
    mergers = {entry.merger: entry.task_id for entry in own}
    attacks = attacks_of(own)
    rows = [(name, tier, [at.get((name, m)) for m in mergers]) for name, tier in attacks.items()]
    return {"testbed": testbed, "mergers": mergers, "rows": rows}


def _points(board: Leaderboard, x: Any) -> dict[str, Any]:
    """A break-cost curve as a table."""
    curves = break_curves(board, x)
    titles = {"per_class": "Labeled examples per class", "flops": "FLOPs of the attack on data"}
    points = [point for curve in curves for point in curve.points.items()]
    return {"title": titles[x], "points": points}


def commands(listed: Listed) -> list[tuple[str, str]]:
    """What to type: (what it does, command)."""
    entry, spec = listed.entry, shlex.quote(listed.spec)
    path = shlex.quote(f"leaderboard/entries/{listed.place}")
    suite = entry.suite.name
    found = [
        ("Check every figure of this entry, and measure three random cells again",
         f"unmergebench verify {path} --rerun 3"),
    ]  # fmt: skip
    if suite in builtin():
        run = f"unmergebench run {shlex.quote(suite)} --defense {spec} --out runs/again"
        found.append(("Measure every cell again", run))
    return found


def _place(row: Row) -> str:
    """``rank 2=``, or why there is none."""
    if row.rank is None:
        return STANDINGS[row.standing]
    return f"rank {row.place}" + ("" if row.track == "weights" else f" among {row.track}")


def shade(value: float) -> str:
    """CSS colours of a cell: vermilion at 0, pale at 0.5, blue at 1, and a text that stands out."""
    ends = (VERMILION, PALE) if value < 0.5 else (PALE, BLUE)
    share = 2 * value if value < 0.5 else 2 * value - 1
    low, high = ([int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends)
    mixed = [round(a + share * (b - a)) for a, b in zip(low, high, strict=True)]
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3294.6 for c in mixed]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # WCAG contrast of white is 1.05/(L+.05), of black (L+.05)/.05; they meet at L = 0.179.
    text = "#000" if light > 0.179 else "#fff"
    return f"background:#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x};color:{text}"


@cache
def table_script() -> str:
    """DataTables, as itables ships it, and what drives it; an inline script.

    Raises:
        UnmergeBenchError: itables' bundle is not what it was.
    """
    bundle = (resources.files("itables") / "html" / "dt_bundle.js").read_text("utf-8")
    # A file:// page may not import modules, so the module becomes a script that sets one name.
    parts = re.split(r"export\s*\{([^}]*)\}\s*;?", bundle)
    named = re.search(r"([\w$]+) as default", parts[1]) if len(parts) == 3 else None
    if named is None:
        raise UnmergeBenchError("this version of itables ships no DataTables; install itables 2")
    own = (resources.files("leaderboard.site") / "templates" / "table.js").read_text("utf-8")
    whole = f"(()=>{{{parts[0]};globalThis.DataTable={named[1]};{parts[2]}\n}})();\n{own}"
    # Nothing in a script may end it, or begin a comment or a script in it.
    return re.sub(r"<(?=!--|/?script)", r"\\x3c", whole, flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    made = Environment(
        loader=ChoiceLoader(
            [PackageLoader("leaderboard.site"), PackageLoader("benchmark.reporting")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=seen,
    )
    made.filters.update(two=two, percent=percent, path=quote)
    made.globals.update(
        FLAGS=FLAGS, STANDINGS=STANDINGS, MARKS=MARKS, TRACKS=TRACKS, score=score,
        shade=shade, href=href,
        arxiv=lambda name: f"https://arxiv.org/abs/{name}" if _ARXIV.match(name) else None,
        style=Markup((resources.files("leaderboard.site") / "templates" / "site.css").read_text()),
    )  # fmt: skip
    return made
