"""The plots of a run, as PNG. Colours run from vermilion (broken) to blue (holds)."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmark.core.paths import replacing
from benchmark.core.records import SEARCHED, Cell
from benchmark.evaluation.thresholds import BROKEN
from benchmark.reporting.board import GATE, Entry, Leaderboard, Tier
from benchmark.reporting.costs import Curve, break_curves
from benchmark.reporting.summary import FixedLine, attacks_of, fixed_lines, scope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
VERMILION, PALE, BLUE = "#D55E00", "#F3EFE6", "#0072B2"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
DPI = 130
LABEL = 36  # characters


def write(folder: Path, cells: Sequence[Cell], board: Leaderboard) -> dict[str, Path]:
    """Draw what the cells allow into ``folder``: caption → file. Each is written atomically.

    A plot that shows these very numbers already is left as it is: a second report costs nothing.
    """
    drawn: dict[str, Path] = {}
    fixed = fixed_lines(cells, [row.defense for row in board.rows])
    mark = _digest(board, fixed)
    places = {entry.testbed for entry in board.matrix}
    for testbed, merger in dict.fromkeys((e.testbed, e.merger) for e in board.matrix):
        where = scope(cells, testbed, merger)
        name = f"heatmap-{_slug(testbed)}-{_slug(merger)}.png"
        caption = f"Protection, merged by {merger} ({where})"
        drawn[caption] = _save(mark, folder / name, partial(heatmap, board, testbed, merger))
    if any(row.robust and row.drop is not None for row in board.rows):
        caption = "What a defense costs its owner, and what it leaves the free-rider"
        drawn[caption] = _save(mark, folder / "utility.png", partial(utility, board))
    by_examples, by_flops = break_curves(board, "per_class"), break_curves(board, "flops")
    for testbed in dict.fromkeys(curve.testbed for curve in by_examples):
        sides = [[c for c in cs if c.testbed == testbed] for cs in (by_examples, by_flops)]
        if len({x for curve in sides[0] for x in curve.points if x}) < 2:
            continue  # one number of examples makes no curve
        name = "break_cost.png" if len(places) == 1 else f"break_cost-{_slug(testbed)}.png"
        caption = f"Protection by what the attacker has: examples, compute ({testbed})"
        drawn[caption] = _save(mark, folder / name, partial(break_cost, *sides))
    for testbed, merger in dict.fromkeys((f.testbed, f.merger) for f in fixed):
        of = [line for line in fixed if (line.testbed, line.merger) == (testbed, merger)]
        name = f"fixed-{_slug(testbed)}-{_slug(merger)}.png"
        caption = f"The literature's measure: fixed shared coefficients, {merger} ({testbed})"
        drawn[caption] = _save(mark, folder / name, partial(fixed_coefficients, of))
    return drawn


def _slug(name: str) -> str:
    """A file name; a digest keeps two specs apart that differ in what a file name cannot hold."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _digest(board: Leaderboard, fixed: Sequence[FixedLine]) -> str:
    """Of all that a plot depends on: the numbers and this file."""
    numbers = [board.model_dump_json(), *(line.model_dump_json() for line in fixed)]
    return hashlib.sha256(Path(__file__).read_bytes() + "\n".join(numbers).encode()).hexdigest()


def _save(mark: str, path: Path, draw: Callable[[], Figure]) -> Path:
    if path.is_file():
        found = path.read_bytes()
        if mark.encode() in found[:1000] and found.endswith(b"IEND\xaeB`\x82"):
            return path
    import matplotlib

    # Names are data: a $ in them is no formula, and a letter the font lacks is not worth a warning.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = draw()
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Description": mark})
    return path


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    # Without pyplot: no global state, no display, and half the import time.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def heatmap(board: Leaderboard, testbed: str, merger: str) -> Figure:
    """Protection, defenses × attacks; words where there is no number."""
    from matplotlib.colors import LinearSegmentedColormap

    at = {
        (e.defense, e.attack): e for e in board.matrix if (e.testbed, e.merger) == (testbed, merger)
    }
    attacks = attacks_of(at.values())
    names = [r.defense for r in board.rows if any((r.defense, a) in at for a in attacks)]
    grid = [[_value(at.get((name, attack))) for attack in attacks] for name in names]
    columns = [f"{_shown(a)}\n({tier})" for a, tier in attacks.items()]
    wide, high = 0.07 * max(map(len, map(_shown, names))), 0.03 * max(map(len, columns))
    figure, axes = _figure(1.5 + wide + 1.05 * len(attacks), 1.3 + high + 0.5 * len(names))
    scale = LinearSegmentedColormap.from_list("protection", (VERMILION, PALE, BLUE))
    colours = scale.with_extremes(bad="#D9D9D9")
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, name in enumerate(names):
        for column, attack in enumerate(attacks):
            entry, value = at.get((name, attack)), grid[row][column]
            extreme = not math.isnan(value) and abs(value - 0.5) > 0.35
            text = "" if entry is None else entry.status if entry.status != "ok" else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8,
                      color="white" if extreme else "black")  # fmt: skip
    axes.set_xticks(range(len(attacks)), columns)
    axes.tick_params(axis="x", labelsize=7, rotation=30)
    axes.set_yticks(range(len(names)), map(_shown, names), fontsize=8)
    axes.set_xlabel("attack (access it needs)")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="protection", shrink=0.8)
    return figure


def _shown(name: str) -> str:
    """A name as a label: of a long one, such as the path of a file, the end, which tells it apart.

    Longer labels than this would leave no room to what they label.
    """
    return name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"


def _value(entry: Entry | None) -> float:
    return math.nan if entry is None else entry.shown


def utility(board: Leaderboard) -> Figure:
    """Points of utility lost against robust protection, with intervals; the gate as a line."""
    figure, axes = _figure(6.6, 4.2)
    shades: list[tuple[Tier, str]] = [("weights", "full"), ("labeled", "none")]
    if len(board.tiers()) < 2:
        shades = shades[:1]
    rows = [row for row in board.rows if row.robust and row.drop is not None]
    drops = [row.drop or 0.0 for row in rows] + [0.0, GATE]
    step = min((max(drops) - min(drops)) / 40, 1 / max(1, len(rows) * len(shades)))
    taken: list[float] = []
    for index, row in enumerate(rows):
        for offset, (tier, fill) in enumerate(shades):
            entry = row.robust.get(tier)
            if entry is None or row.drop is None:
                continue
            low, high = entry.bounds if entry.interval else (entry.shown, entry.shown)
            x, y = row.drop, entry.shown
            while any(abs(x - other) < 0.9 * step for other in taken):
                x += step  # exact methods lose nothing: side by side, not on top of each other
            if "utility-gate" not in row.flags:
                x = min(x, GATE - step / 2)  # but never across the line
            taken.append(x)
            label = _shown(row.defense) + ("" if row.role == "method" else f" ({row.role})")
            axes.errorbar(
                x, y, yerr=[[max(0, y - low)], [max(0, high - y)]],
                # Another marker in each round of colours, or the ninth would look like the first.
                marker=MARKERS[(index + index // len(SERIES)) % len(MARKERS)],
                color=SERIES[index % len(SERIES)], fillstyle=fill,
                capsize=2, markersize=5, linewidth=1, linestyle="none",
                label=label if not offset else None,
            )  # fmt: skip
    axes.axvline(GATE, color="grey", linestyle="--", linewidth=1)
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    gate = f"utility gate\n{GATE:g} points"
    axes.annotate(gate, (GATE, 0.99), xytext=(4, 0), fontsize=7, va="top", **where)
    axes.set_xlabel(
        "points of accuracy the release loses against the expert\n"
        "(what would lie on one place is drawn side by side)", fontsize=8,
    )  # fmt: skip
    hollow = "; hollow: attacker has labeled data too" if len(shades) > 1 else ""
    axes.set_ylabel(f"robust protection\n(weights only{hollow})", fontsize=8)
    axes.set_ylim(-0.05, 1.05)
    if axes.get_legend_handles_labels()[0]:  # nothing stands there without the weights tier
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def break_cost(by_examples: Sequence[Curve], by_flops: Sequence[Curve]) -> Figure:
    """Protection with its intervals against labelled examples per class, and against compute.

    Symlog axes; 0 is the best attack with weights alone. Points of one x are drawn a little apart,
    or equal defenses would hide one another.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    labels = (
        "labelled examples per class (0: weights only)",
        "FLOPs of the attack on data (0: weights only)",
    )
    names = [curve.defense for curve in by_examples]
    for place, (curves, label) in enumerate(zip((by_examples, by_flops), labels, strict=True)):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        marks = sorted({x for curve in curves for x in curve.points})
        least = next(x for x in marks if x)
        for index, curve in enumerate(c for c in curves if c.known()):
            row = names.index(curve.defense) if curve.defense in names else len(names) + index
            shift = 0.4 * ((row + 0.5) / max(1, len(names)) - 0.5)
            found = curve.known()
            values = [entry.shown for entry in found.values()]
            bounds = [e.bounds if e.interval else (e.shown, e.shown) for e in found.values()]
            low = [max(0.0, v - b[0]) for v, b in zip(values, bounds, strict=True)]
            high = [max(0.0, b[1] - v) for v, b in zip(values, bounds, strict=True)]
            axes.errorbar(
                [x * 2**shift if x else shift * least for x in found], values, yerr=[low, high],
                marker=MARKERS[row % len(MARKERS)], color=SERIES[row % len(SERIES)],
                linestyle=("-", "--")[row // len(SERIES) % 2], linewidth=1.2, markersize=5,
                capsize=2, label=_shown(curve.defense),
            )  # fmt: skip
        axes.axhline(BROKEN, color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("symlog", base=2, linthresh=least, linscale=1.0)
        names_of = [f"{x:g}" if x < 1e4 else f"{x:.1e}" for x in marks]
        axes.set_xticks(marks, names_of, fontsize=7, rotation=0 if max(marks) < 1e4 else 40)
        axes.minorticks_off()
        axes.set_xlim(-0.5 * least, 1.5 * max(marks))
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_ylabel("protection left by the best attack", fontsize=8)
    figure.axes[0].annotate(
        "broken below", (0.01, BROKEN), xytext=(0, -8), textcoords="offset points", fontsize=7,
        xycoords=("axes fraction", "data"), color="grey",
    )  # fmt: skip
    figure.axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def fixed_coefficients(lines: Sequence[FixedLine]) -> Figure:
    """Accuracy of the merged model on the victims' tasks, one bar per shared coefficient."""
    coefficients = sorted(
        {c for line in lines for c in line.accuracy},
        key=lambda c: math.inf if c == SEARCHED else float(c),
    )
    figure, axes = _figure(6.6, 1.5 + (0.18 + 0.16 * len(coefficients)) * len(lines))
    thickness = 0.8 / len(coefficients)
    for index, coefficient in enumerate(coefficients):
        places = [row + (index + 0.5) * thickness - 0.4 for row in range(len(lines))]
        values = [100 * line.accuracy.get(coefficient, math.nan) for line in lines]
        axes.barh(places, values, thickness * 0.92, color=SERIES[index % len(SERIES)],
                  label=f"coefficient {coefficient}")  # fmt: skip
    for name, style in (("expert", "-"), ("zero_shot", ":")):
        known = [v for line in lines if (v := getattr(line, name)) is not None]
        if known:
            label = name.replace("_", "-") + ", unmerged"
            axes.axvline(
                100 * fmean(known), color="black", linestyle=style, linewidth=1, label=label
            )
    axes.set_yticks(range(len(lines)), [_shown(line.defense) for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy of the merged model on the victim's task, % (no attack)")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return figure
