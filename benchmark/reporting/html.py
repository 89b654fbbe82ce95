"""report.html: one self-contained page, plots inside, nothing fetched, every string escaped."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmark.core.records import Cell
from benchmark.reporting import columns
from benchmark.reporting.board import TRACKS, Entry, Leaderboard
from benchmark.reporting.costs import Curve, break_curves
from benchmark.reporting.drawn import data_uri, drawn
from benchmark.reporting.shown import MARKS, percent, score
from benchmark.reporting.summary import (
    accuracy_lines,
    attacks_of,
    fixed_lines,
    scope,
    task_lines,
    verdict,
)

_BARE_KEY = re.compile(r"^[A-Za-z0-9_-]+$")


def page(
    cells: Sequence[Cell],
    board: Leaderboard,
    run: Mapping[str, Any],
    plots: Mapping[str, Path],
    run_dir: Path,
) -> str:
    """The whole page. ``plots`` maps captions to PNG files; ``run`` is the content of run.json."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from benchmark.evaluation.flags import FLAGS

    environment = Environment(
        loader=PackageLoader("benchmark.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, two=two)
    environment.globals.update(MARKS=MARKS, TRACKS=TRACKS, score=score)
    order = [row.defense for row in board.rows]
    suite = dict(run.get("suite") or {})
    return environment.get_template("report.html.j2").render(
        title=str(suite.get("name") or run_dir.name),
        suite=suite,
        run=run,
        facts=_facts(run, cells),
        board=board,
        columns=columns.of_view("page", board),
        tracks={track: [row for row in board.rows if row.track == track] for track in TRACKS},
        terms=columns.TERMS,
        verdict=verdict,
        matrices=[_matrix(board, cells, *key) for key in _places(board)],
        breaking=[table for x in ("per_class", "flops") if (table := _breaking(board, x))],
        uses=list(dict.fromkeys(use for row in board.rows for use in row.benign)),
        left_out=_left_out(cells),
        drawn=drawn(cells),
        tasks=task_lines(cells),
        accuracies=accuracy_lines(cells, order),
        fixed=fixed_lines(cells, order),
        troubles=[cell for cell in cells if cell.status != "ok"],
        plots={caption: data_uri(path.read_bytes()) for caption, path in plots.items()},
        flags={name: FLAGS[name] for name in sorted(_flags(board)) if name in FLAGS},
        commands=commands(run, run_dir),
        suite_toml=suite_toml(suite),
    )


def two(value: float | None) -> str:
    """A number for people, with two digits."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _places(board: Leaderboard) -> list[tuple[str, str]]:
    return list(dict.fromkeys((entry.testbed, entry.merger) for entry in board.matrix))


def _flags(board: Leaderboard) -> set[str]:
    of_attacks = (flags for flags in board.attack_flags.values())
    return {flag for flags in (*(row.flags for row in board.rows), *of_attacks) for flag in flags}


def _matrix(board: Leaderboard, cells: Sequence[Cell], testbed: str, merger: str) -> dict[str, Any]:
    at: dict[tuple[str, str], Entry] = {
        (entry.defense, entry.attack): entry
        for entry in board.matrix
        if (entry.testbed, entry.merger) == (testbed, merger)
    }
    attacks = attacks_of(at.values())
    names = [r.defense for r in board.rows if any((r.defense, a) in at for a in attacks)]
    rows = [(name, [at.get((name, attack)) for attack in attacks]) for name in names]
    return {
        "merger": merger,
        "scope": scope(cells, testbed, merger),
        "attacks": attacks,
        "rows": rows,
    }


def _breaking(board: Leaderboard, x: Literal["per_class", "flops"]) -> dict[str, Any]:
    """Protection by what attacks used, as a table; empty where no attack used any."""
    curves: list[Curve] = break_curves(board, x)
    marks = sorted({at for curve in curves for at in curve.points})
    several = len({curve.testbed for curve in curves}) > 1
    rows = [
        (
            f"{curve.testbed}: {curve.defense}" if several else curve.defense,
            [curve.points.get(at) for at in marks],
        )
        for curve in curves
    ]
    titles = {"per_class": "labelled examples per class", "flops": "FLOPs of the attack on data"}
    heads = ["weights only" if not at else f"{at:g}" if at < 1e4 else f"{at:.1e}" for at in marks]
    return {"title": titles[x], "heads": heads, "rows": rows} if rows else {}


def _left_out(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """(defense, use and model, why): honest uses that are impossible or give nothing."""
    found = [
        (cell.defense, key.removeprefix("benign."), str(why))
        for cell in cells
        for key, why in cell.notes.items()
        if key.startswith("benign.")
    ]
    return list(dict.fromkeys(found))


def _facts(run: Mapping[str, Any], cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Where the numbers come from, as name and value."""
    facts: list[tuple[str, str]] = []
    for name in ("created", "seconds", "device", "seeds", "schema_version"):
        if run.get(name) is not None:
            facts.append((name.replace("_", " "), _plain(run[name])))
    facts.append(("cells", str(len(cells))))
    for group in ("git", "environment", "packages", "testbed"):
        value = run.get(group)
        if isinstance(value, Mapping):
            facts += [(f"{group}: {name}", _plain(item)) for name, item in value.items()]
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def commands(run: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """What to type to get these numbers again: (what it does, command)."""
    suite = dict(run.get("suite") or {})
    found = [("Recompute every aggregate from the cells", f"unmergebench report {run_dir.name}")]
    if suite:
        name = str(suite.get("name", ""))
        word = name if _ships(name, suite.get("hash")) else "suite.toml"
        what = "Measure every cell again"
        if word == "suite.toml":
            what += " (save the suite below as suite.toml first)"
        found.append((what, f"unmergebench run {word} --out again"))
    return found


def _ships(name: str, digest: object) -> bool:
    """Whether the package has this very suite under that name."""
    from benchmark.pipeline.suite import builtin, load

    return name in builtin() and load(name).hash == digest


def suite_toml(suite: Mapping[str, Any]) -> str:
    """The suite as a file that ``unmergebench run`` reads back to the same hash."""
    kept = {name: value for name, value in suite.items() if name != "hash" and value is not None}
    return "".join(f"{_key(name)} = {_toml(value)}\n" for name, value in kept.items())


def _key(name: str) -> str:
    return name if _BARE_KEY.match(name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(
            f"{_key(str(name))} = {_toml(item)}" for name, item in value.items() if item is not None
        )
        return f"{{ {inner} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # JSON's strings, numbers and booleans are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
