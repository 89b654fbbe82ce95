"""What others' code reads: leaderboard.csv, .parquet, .json, entries.json and their schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmark.reporting.board import TIERS, Standing, Tier, Track
from benchmark.reporting.columns import FIELDS
from leaderboard.entry import json_schema
from leaderboard.runs import COLUMNS, record
from leaderboard.site.collect import Listed, Question

if TYPE_CHECKING:
    import pandas as pd

_FACTS = ("question", "suite", "version", "created", "credit", "source_sha256", "entry")
_KNOWN = tuple(f"best_known_{tier}" for tier in TIERS)

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Item(BaseModel):
    """One entry. ``url``, ``page``: relative to the site. ``question``: equal where comparable.

    ``robust``, and ``low``, by which is ranked: raw, by tier; ``best_known``: clipped, only with
    certificates. They, ``track``, ``standing`` and ``rank`` are empty for an entry that no longer
    counts.
    """

    model_config = ConfigDict(extra="forbid")

    defense: str
    version: str
    suite: str
    question: str
    testbed: str
    created: datetime
    credit: str
    url: str
    sha256: str
    page: str
    source_sha256: str
    flags: list[str]
    superseded_by: str
    invalidated: str
    certificates: int
    track: Track | None = None
    standing: Standing | None = None
    rank: int | None = None
    robust: dict[Tier, float | None] = {}
    low: dict[Tier, float] = {}
    as_published: float | None = None
    best_known: dict[Tier, float] = {}


class Listing(BaseModel):
    """entries.json: every entry there is, with what follows from those that count."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    entries: list[Item]


def frame(questions: Sequence[Question]) -> pd.DataFrame:
    """One row per entry that counts, in the order of the page."""
    import pandas as pd

    rows = [
        {**_facts(question, listed), **record(row), **_known(listed)}
        for question in questions
        for row, listed in question.rows
    ]
    made = pd.DataFrame(rows, columns=[*_FACTS, *COLUMNS, *_KNOWN])
    return made.astype({field.name: "Int64" for field in FIELDS if field.whole})


def _facts(question: Question, listed: Listed) -> dict[str, Any]:
    entry = listed.entry
    return {
        "question": question.id,
        "suite": entry.suite.name,
        "version": entry.version,
        "created": entry.created,
        "credit": entry.credit,
        "source_sha256": entry.defense.source_sha256,
        "entry": f"entries/{listed.place}",
    }


def _known(listed: Listed) -> dict[str, float]:
    return {f"best_known_{tier}": value for tier, value in listed.known.items()}


def listing(
    everything: Sequence[Listed], questions: Sequence[Question], pages: dict[str, str]
) -> Listing:
    """entries.json. ``pages``: defense → its page."""
    rows = {listed.place: row for q in questions for row, listed in q.rows}
    items = []
    for listed in everything:
        entry, row = listed.entry, rows.get(listed.place)
        item = Item(
            **entry.model_dump(include={"version", "created", "credit", "superseded_by"}),
            invalidated=entry.invalidated,
            defense=listed.spec,
            suite=entry.suite.name,
            question=entry.question[:12],
            testbed=entry.subjects.testbed,
            url=f"entries/{listed.place}",
            sha256=listed.sha256,
            page=pages[listed.spec],
            source_sha256=entry.defense.source_sha256,
            flags=list(entry.flags),
            certificates=len(entry.certificates),
        )
        if row:
            item.track, item.standing, item.rank = row.track, row.standing, row.rank
            item.robust = {tier: one.protection for tier, one in row.robust.items()}
            item.low = {tier: one.low for tier, one in row.robust.items()}
            item.as_published = row.as_published.protection if row.as_published else None
            item.best_known = listed.known
        items.append(item)
    return Listing(entries=items)


def write(site: Path, everything: Sequence[Listed], questions: Sequence[Question],
          pages: dict[str, str]) -> None:  # fmt: skip
    """Write all of them, and the entries themselves as they are, into ``site``."""
    table = frame(questions)
    table.to_parquet(site / "leaderboard.parquet", index=False)
    _safe(table).to_csv(site / "leaderboard.csv", index=False)
    rows = json.loads(table.to_json(orient="records", date_format="iso", double_precision=15))
    _json(site / "leaderboard.json", {"schema_version": 1, "rows": rows})
    found = listing(everything, questions, pages)
    _json(site / "entries.json", found.model_dump(mode="json"))
    _json(site / "entries.schema.json", Listing.model_json_schema())
    _json(site / "schema.json", json_schema())
    for listed in everything:
        path = site / "entries" / listed.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(listed.data)


def _safe(table: pd.DataFrame) -> pd.DataFrame:
    """Text that a spreadsheet would run as a formula is quoted with an apostrophe."""

    def quoted(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

    return table.map(quoted)


def _json(path: Path, value: object) -> None:
    # ASCII: what hides or turns text around in a file is then seen for what it is.
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="ascii")
