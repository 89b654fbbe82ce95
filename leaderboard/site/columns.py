"""The columns of the site's table: every run's, and those that only entries have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from benchmark.reporting.board import Row, band
from benchmark.reporting.columns import Column, of_view
from benchmark.reporting.shown import Shown

if TYPE_CHECKING:
    from leaderboard.site.collect import Listed, Question


class Answer(NamedTuple):
    """A row of the table, and where it comes from. ``page``: that of its defense."""

    question: Question
    row: Row
    listed: Listed
    page: str


class SiteColumn(NamedTuple):
    """As :class:`benchmark.reporting.columns.Column`, of an answer."""

    name: str
    title: str
    help: str
    show: Callable[[Answer], Shown]
    access: str = ""
    number: bool = False


def _of(column: Column) -> SiteColumn:
    def show(answer: Answer) -> Shown:
        return column.show(answer.row)

    return SiteColumn(
        column.name,
        column.title,
        column.help,
        _defense if column.name == "defense" else show,
        column.access,
        column.number,
    )


def _defense(answer: Answer) -> Shown:
    """With a link to its page, and whom to thank."""
    (column,) = (c for c in of_view("site") if c.name == "defense")
    shown = column.show(answer.row)
    credit = answer.listed.entry.credit
    below = (*shown.below, credit) if credit else shown.below
    return shown._replace(href=answer.page, below=below)


def _known(answer: Answer) -> Shown:
    known = answer.listed.known
    if not known:
        return Shown("–", "dim", spoken="no certificate")
    # A tier is named only where it knows less than the one before: more access never hurts.
    said, least = [], 2.0
    for tier, value in known.items():
        if value < least:
            said.append(f"{value:.2f} ({tier})")
            least = value
    credits = (f"{c.attack}, by {c.credit}" for c in answer.listed.entry.certificates)
    return Shown(f"{least:.2f}", band(least), below=(", ".join(said), *credits), order=least)


def _version(answer: Answer) -> Shown:
    entry = answer.listed.entry
    href = f"entries/{answer.listed.place}"
    return Shown(entry.version, below=(str(entry.created.date()),), href=href)


_KNOWN = SiteColumn(
    "known",
    "Best known",
    "Where someone filed a stronger attack than the suite's, what it leaves: it was replayed here. "
    "Ranks stay those of the suite.",
    _known,
)

COLUMNS = (
    *(_of(column) for column in of_view("site")),
    _KNOWN,
    SiteColumn(
        "suite",
        "Suite",
        "Testbed, victims, partners, attacks, mergers and seeds that were asked. Only entries of "
        "one suite can be compared.",
        lambda answer: Shown(answer.question.label),
    ),
    SiteColumn(
        "version",
        "Version",
        "Suite and number of the entry; the link is the entry itself, with every raw cell.",
        _version,
    ),
)

#: The one-line table on a defense's own page.
SUMMARY = (*(_of(column) for column in of_view("summary")), _KNOWN)

#: What attackers hold at most, or ``task-aware``: each has a column of robust protection.
ACCESSES = tuple(column.access for column in COLUMNS if column.access)
