"""What stands on the leaderboard: one defense under one suite, with all that is needed to check it.

An entry is data and is never executed. It holds raw cells only; every aggregate is computed from
them when it is read (:func:`leaderboard.runs.board`). What can be read can be put together: cells
whose parts do not fit each other are refused here, wrong figures by :mod:`leaderboard.checks`.
"""

from __future__ import annotations

import json
from math import prod
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from benchmark.api.contracts import Card
from benchmark.core.errors import UnmergeBenchError
from benchmark.core.keys import sha
from benchmark.core.pictures import unpack
from benchmark.core.records import Cell
from benchmark.evaluation.soundness import measured, unfit
from benchmark.pipeline.suite import Suite
from leaderboard.strict import UNSEEN

#: That of the cells it holds: 1 could not say which cells count, nor recompute utility.
SCHEMA_VERSION = 2

Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Cells that one suite may ask of one defense.
MAX_CELLS = 100_000
#: Test examples per task: outcomes are resampled a thousand times.
MAX_TEST = 20_000
#: JSON characters of what has no schema (settings, notes, environment).
MAX_FREE = 50_000


def _plain(text: str) -> str:
    if found := UNSEEN.search(text):
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
        if self.definition.name != self.name:
            raise ValueError("the suite's name is not that of its definition")
        if self.definition.test > MAX_TEST:
            raise ValueError(f"more than {MAX_TEST} test examples per task")
        asked = (self.definition.groups, self.definition.seeds)
        made = (self.definition.attacks, self.definition.mergers)
        if prod(map(len, (*asked, *made))) > MAX_CELLS:
            raise ValueError(f"asks for more than {MAX_CELLS} cells")
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
    created: AwareDatetime
    cells: tuple[Cell, ...] = Field(min_length=1, max_length=1000)


class Entry(_Strict):
    """One version of one defense under one suite."""

    schema_version: Literal[2] = 2
    version: Annotated[
        str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,80}-[1-9][0-9]{0,5}$")
    ]
    suite: SuiteId
    defense: Method
    subjects: Subjects
    cells: tuple[Cell, ...] = Field(min_length=1, max_length=MAX_CELLS)
    environment: dict[Name, Any] = Field(max_length=50)
    flags: tuple[Name, ...] = Field(default=(), max_length=50)
    credit: Line = ""
    created: AwareDatetime
    #: The version that took its place.
    superseded_by: Line = ""
    #: Why it no longer counts.
    invalidated: Line = ""
    certificates: tuple[Certificate, ...] = Field(default=(), max_length=100)

    @model_validator(mode="after")
    def _readable(self) -> Entry:
        _small(self.environment, "environment")
        for cell in self.all_cells:
            if (cell.defense, cell.testbed) != (self.defense.spec, self.subjects.testbed):
                raise ValueError("a cell of another defense or testbed")
            _fits(cell, self.suite.definition.test)
        return self

    @property
    def all_cells(self) -> list[Cell]:
        """Its own and those of its certificates."""
        return [*self.cells, *(cell for one in self.certificates for cell in one.cells)]

    @property
    def question(self) -> str:
        """A hash that two entries share if one suite was asked about both, on the same data.

        The suite's own hash also covers the defense it asks about.
        """
        asked = self.suite.definition.model_dump(exclude={"name", "description", "defenses"})
        return sha({"suite": asked, "testbed": self.subjects.testbed, "data": self.subjects.data})

    @property
    def number(self) -> int:
        """Which version of this defense and suite."""
        return int(self.version.rpartition("-")[2])

    @property
    def stands(self) -> bool:
        """Whether it counts: neither invalidated nor superseded."""
        return not (self.invalidated or self.superseded_by)


def asked_of(suite: Suite, spec: str) -> Suite:
    """The suite with ``spec`` as its only defense: what an entry answers."""
    return suite.model_copy(update={"defenses": (spec,)})


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an entry's file, for readers in other languages.

    What JSON Schema cannot say (hashes that fit, figures that follow) is left to ``verify``.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"unmergebench-entry-{SCHEMA_VERSION}.json",
        **Entry.model_json_schema(mode="serialization"),
        "title": f"UnmergeBench leaderboard entry, version {SCHEMA_VERSION}",
    }


#: What a cell that was not measured has not.
_FIGURES = (
    "accuracy", "normalized", "gain", "gain_undefended", "gain_outside", "gain_reference",
    "protection", "protection_ci", "merged_accuracy", "fixed", "expert_accuracy", "zero_shot",
    "utility", "utility_drop", "standalone", "seen", "logit_gap", "bf16_gap", "bf16_gap_expert",
    "recovered_gap", "correct", "benign", "quality", "pictures",
    "flags",
)  # fmt: skip


def _small(value: object, what: str) -> None:
    if len(json.dumps(value, default=str)) > MAX_FREE:
        raise ValueError(f"{what} holds over {MAX_FREE} characters")


def _fits(cell: Cell, test: int) -> None:
    """Refuse a cell that aggregation could stumble over."""
    for free in ("setting", "merged_setting", "ensemble", "notes"):
        _small(getattr(cell, free), free)
    texts = [text for outcomes in cell.correct.values() for text in outcomes.values()]
    if max(map(len, texts), default=0) > test // 4 + 4:
        raise ValueError("more outcomes than the suite has test examples")
    if problem := unfit(cell):
        raise ValueError(problem)
    for text in cell.pictures.values():
        try:
            unpack(text)
        except UnmergeBenchError as error:
            raise ValueError(str(error)) from None
    if not measured(cell) and any(getattr(cell, f) not in (None, {}, []) for f in _FIGURES):
        raise ValueError(f"a cell with status {cell.status} holds figures")
