"""Figures as SVG that takes the page's colours, dark or light. Names in them are text, escaped.

``key`` tells the figures of one page apart.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from benchmark.reporting import plots
from benchmark.reporting.board import Leaderboard
from benchmark.reporting.costs import break_curves
from benchmark.reporting.summary import FixedLine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OUTSIDE = re.compile(r"^.*?(?=<svg )|<metadata>.*?</metadata>", re.DOTALL)
_GROUP_ID = re.compile(r'<g id="[\w.]+">')
_BLACK = re.compile(r"(?<=[ :])#000000(?=[;\"])")
_SIZE = re.compile(r'(<svg [^>]*?)\s+width="[^"]*"|\s+height="[^"]*"')


def scatter(board: Leaderboard, key: str) -> Markup | None:
    """Points of utility lost against robust protection; None where nothing has both."""
    if not any(row.robust and row.drop is not None for row in board.rows):
        return None
    label = "Robust protection of each defense by the points of accuracy it costs its owner"
    return _svg(label, key, lambda: plots.utility(board))


def break_cost(board: Leaderboard, key: str) -> Markup | None:
    """Protection by what an attacker has; None where no attack used labeled data and compute."""
    examples, flops = break_curves(board, "per_class"), break_curves(board, "flops")
    if not examples or not flops:
        return None
    label = "Protection left by the best attack, by labeled examples per class and by FLOPs"
    return _svg(label, key, lambda: plots.break_cost(examples, flops))


def coefficient_curve(lines: Sequence[FixedLine], key: str) -> Markup | None:
    """Accuracy of unattacked merges on the victims' tasks by the shared coefficient λ."""
    if not any(line.accuracy for line in lines):
        return None
    label = "Accuracy of the unattacked merged model on the victim's task by its coefficient"
    return _svg(label, key, lambda: _coefficients(lines))


def _coefficients(lines: Sequence[FixedLine]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for index, line in enumerate(lines):
        points = sorted((float(at), 100 * value) for at, value in line.accuracy.items())
        axes.plot(
            [at for at, _ in points], [value for _, value in points],
            marker=plots.MARKERS[index % len(plots.MARKERS)],
            color=plots.SERIES[index % len(plots.SERIES)],
            markersize=max(4, 12 - 4 * index),  # equal curves stay visible behind each other
            linestyle=("-", "--", ":")[index // len(plots.SERIES) % 3], label=line.merger,
        )  # fmt: skip
    for name, style in (("expert", "-"), ("zero_shot", ":")):
        known = [value for line in lines if (value := getattr(line, name)) is not None]
        if known:
            label = f"{name.replace('_', '-')}, unmerged"
            level = 100 * sum(known) / len(known)
            axes.axhline(level, color="grey", linestyle=style, linewidth=1, label=label)
    axes.set_ylim(0, 102)
    marks = sorted({float(at) for line in lines for at in line.accuracy})
    axes.set_xlim(0, max(1.0, 1.1 * marks[-1]))
    axes.set_xticks([0, *marks], ["0", *(f"{mark:g}" for mark in marks)])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("coefficient λ, the same for all members", fontsize=8)
    axes.set_ylabel("accuracy on the victim's task, %", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _svg(label: str, key: str, draw: Callable[[], Figure]) -> Markup:
    # matplotlib makes its ids from the salt: two figures of one page need two.
    import matplotlib

    settings: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": key + label}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = draw()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = _OUTSIDE.sub("", buffer.getvalue())
    text = _GROUP_ID.sub("<g>", _BLACK.sub("currentColor", text))
    head, rest = text.split(">", 1)
    head = _SIZE.sub(lambda match: match[1] or "", head)
    return Markup(f'{head} role="img" aria-label="{escape(label)}">{rest}')
