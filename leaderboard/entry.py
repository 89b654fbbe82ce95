"""What stands on the leaderboard: one defense under one suite, with all that is needed to check it.

An entry is data and is never executed. It holds raw cells only; every aggregate is computed from
them when it is read (:func:`leaderboard.runs.board`).
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from benchmark.contracts import Card
from benchmark.pipeline.suite import Suite
from benchmark.records import Cell

SCHEMA_VERSION = 1

Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: C0 and C1 controls, and what turns the direction of text around or hides in it.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def _plain(text: str) -> str:
    if found := _UNSEEN.search(text):
        raise ValueError(f"holds the invisible character U+{ord(found[0]):04X}")
    return text


#: One line of text for people.
Line = Annotated[str, StringConstraints(max_length=400), AfterValidator(_plain)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_plain)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SuiteId(_Strict):
    """The suite that was run: its name, the hash of its content, the content."""

    name: Name
    hash: Sha
    definition: Suite

    @model_validator(mode="after")
    def _own_hash(self) -> SuiteId:
        if self.definition.hash != self.hash:
            raise ValueError("the suite's hash is not that of its definition")
        return self


class Method(_Strict):
    """The defense: how it is named, what it claims, the sha256 of the source that made it."""

    spec: Name
    card: Card
    source_sha256: Sha


class Subjects(_Strict):
    """What was worked on: the testbed with the hash of its data, and sha256 of the States."""

    testbed: Name
    data: Sha
    base: Sha
    experts: dict[Name, Sha]
    #: "victim/seed" → release.
    released: dict[Name, Sha]


class Certificate(_Strict):
    """A stronger attack than the suite's, replayed: its cells on the entry's victims.

    ``same_release``: the weights attacked were the entry's own, bit for bit. Training on another
    machine gives others, made by the same defense with the same seed.
    """

    attack: Name
    merger: Name
    credit: Line
    same_release: bool
    created: datetime
    cells: tuple[Cell, ...] = Field(min_length=1, max_length=1000)


class Entry(_Strict):
    """One version of one defense under one suite."""

    schema_version: Literal[1] = 1
    version: Annotated[
        str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,80}-[1-9][0-9]{0,5}$")
    ]
    suite: SuiteId
    defense: Method
    subjects: Subjects
    cells: tuple[Cell, ...] = Field(min_length=1, max_length=100_000)
    environment: dict[Name, Any] = Field(max_length=50)
    flags: tuple[Name, ...] = ()
    credit: Line = ""
    created: datetime
    #: The version that took its place.
    superseded_by: Line = ""
    #: Why it no longer counts.
    invalidated: Line = ""
    certificates: tuple[Certificate, ...] = Field(default=(), max_length=100)

    @property
    def stands(self) -> bool:
        """Whether it counts: neither invalidated nor superseded."""
        return not (self.invalidated or self.superseded_by)
