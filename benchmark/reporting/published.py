"""The papers' printed figures, each with what this run measured in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmark.api.specs import parse
from benchmark.core.errors import UsageError
from benchmark.core.records import SEARCHED, Cell
from benchmark.pipeline.published import Published

_MEANS = {"mean": "mean over tasks", "all": "mean over all tasks of a merge"}
#: What is measured of a release by itself.
_ALONE = ("standalone", "alignment-alone")


class Measured(BaseModel):
    """Accuracies in %, None where the run has none. ``coefficient``: at which λ; ``victims``:
    over how many of them.
    """

    model_config = ConfigDict(extra="forbid")

    unprotected: float | None = None
    protected: float | None = None
    attacked: float | None = None
    coefficient: str = ""
    victims: int = 0


class PublishedLine(BaseModel):
    """A printed figure and the same measured; ``remark`` says what keeps them from being equal."""

    model_config = ConfigDict(extra="forbid")

    printed: Published
    measured: Measured
    remark: str = ""

    @property
    def label(self) -> str:
        """``params, 0.8: cars of cars+resisc45``."""
        p = self.printed
        parts = [p.defense, *([p.attack] if p.attack != "none" else [])]
        where = "alone" if p.what in _ALONE else f"by {p.merger}"
        where += ", alignment" if p.what.startswith("alignment") else ""
        at = f" at {p.coefficient:g}" if p.coefficient is not None else ""
        task = _MEANS.get(p.task, p.task)
        if p.partners:
            task += f" ({'+'.join((p.victim or p.task, *p.partners))})"
        base = f", {p.testbed}" if p.testbed else ""
        return f"{' × '.join(parts)}, {where}{at}: {task}{base}"


def published_lines(cells: Sequence[Cell], run: Mapping[str, Any]) -> list[PublishedLine]:
    """The figures of the suite in ``run`` (the content of run.json), in its order.

    Measured: the mean over seeds, and over victims for ``mean``; merged accuracy is at the fixed
    coefficients, whatever a free-rider would choose.
    """
    suite = dict(run.get("suite") or {})
    try:
        printed = [Published.model_validate(figure) for figure in suite.get("published") or ()]
    except ValidationError:  # of a version that knew other fields: the cells are still good
        return []
    own = str(suite.get("testbed", ""))
    fixed = [f"{c:g}" for c in suite.get("fixed_coefficients") or ()]
    if suite.get("shared_search"):
        fixed = [SEARCHED]
    return [_line(figure, own, fixed, cells) for figure in printed]


def _line(figure: Published, own: str, fixed: list[str], cells: Sequence[Cell]) -> PublishedLine:
    if not _is(own, figure.testbed):
        return PublishedLine(printed=figure, measured=Measured(), remark="not on this testbed")
    remark = ""
    at = "" if figure.coefficient is None else f"{figure.coefficient:g}"
    if figure.what == "alignment":
        remark = "merged as a free-rider does, the source names no λ"
    if not at and figure.what == "merged":
        at = fixed[0] if fixed else ""
        remark = "" if at == SEARCHED else f"λ {at} is ours, the source names none"
    fitting = [cell for cell in cells if _fits(cell, figure)]

    def mean(defense: str, attack: str) -> float | None:
        of = [cell for cell in fitting if (cell.defense, cell.attack) == (defense, attack)]
        values = [value for cell in of if (value := _value(cell, figure, at)) is not None]
        return 100 * fmean(values) if values else None

    measured = Measured(
        unprotected=None if figure.unprotected is None else mean("none", "none"),
        protected=None if figure.protected is None else mean(figure.defense, "none"),
        attacked=None if figure.attacked is None else mean(figure.defense, figure.attack),
        coefficient=at,
        victims=len({cell.victim for cell in fitting}),
    )
    return PublishedLine(printed=figure, measured=measured, remark=remark)


def _fits(cell: Cell, figure: Published) -> bool:
    if figure.what not in _ALONE and cell.merger != figure.merger:
        return False
    victim = figure.victim or (cell.victim if figure.task in _MEANS else figure.task)
    partners = set(figure.partners or cell.partners)
    return cell.victim == victim and set(cell.partners) == partners


def _value(cell: Cell, figure: Published, at: str) -> float | None:
    if figure.what.startswith("alignment"):
        who = "released" if figure.what in _ALONE else "attacked"
        return cell.quality.get(who, {}).get("alignment")
    if figure.what == "standalone":
        return cell.utility if cell.attack == "none" else cell.standalone
    found = cell.fixed.get(at, {})
    if figure.task == "all":
        return fmean(found.values()) if found else None
    return found.get(cell.victim if figure.task == "mean" else figure.task)


def _is(own: str, wanted: str) -> bool:
    """Whether the run's testbed has the wanted name, and each parameter that is named with it."""
    try:
        (name, given), (other, asked) = parse(own), parse(wanted or own)
    except UsageError:  # the name of a base that is no testbed, such as "Llama-2 chat"
        return False
    return name == other and all(given.get(key) == value for key, value in asked.items())
