"""What a ranking consists of: the typed, JSON-exportable leaderboard."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmark.core.records import SCHEMA_VERSION, Status
from benchmark.evaluation.thresholds import BROKEN, HOLDS, UTILITY_GATE
from benchmark.reporting.published import PublishedLine

Tier = Literal["weights", "unlabeled", "labeled"]
TIERS: tuple[Tier, ...] = ("weights", "unlabeled", "labeled")
Role = Literal["method", "control", "reference"]
Standing = Literal["ranked", "below-gate", "two-faced", "unranked", "control", "reference"]
Track = Literal["weights", "modules", "secrets", "generators"]
#: Rankings that are not compared, in words: weights in the base's own architecture, releases whose
#: users run other modules than mergers see, releases that are to keep secrets, not a skill, and
#: generators, whose answers are judged by another model.
TRACKS: dict[Track, str] = {
    "weights": "Ranking by robust protection (lower end): the least of all attacks and mergers",
    "modules": "Ranking of releases whose users run other modules than mergers see",
    "secrets": "Ranking of releases that keep secrets: what merging them does not bring out",
    "generators": "Ranking of generators, by what a frozen judge sees in what they draw",
}

#: In the order of the table.
STANDINGS: dict[Standing, str] = {
    "ranked": "ranked",
    "below-gate": "fails utility gate",
    "two-faced": "two-faced",
    "unranked": "no rank",
    "control": "control",
    "reference": "reference",
}

#: Points of standalone accuracy that a defense may cost its owner.
GATE = float(100 * UTILITY_GATE)


class Entry(BaseModel):
    """One defense × attack × merger on one testbed: all its victims, partners and seeds together.

    ``protection`` is the raw ratio of sums; None unless ``status`` is ``ok``. One cell with an
    error makes the whole entry ``error``. ``reasons`` says why it is not ``ok``. ``winners``: in
    how many cells each attack of an ensemble was the one that validation picked.
    ``one_coefficient``: its merger searches none and gives all members one.
    """

    model_config = ConfigDict(extra="forbid")

    testbed: str
    merger: str
    defense: str
    attack: str
    access: Tier
    task_id: bool = False
    one_coefficient: bool = False
    status: Status = "ok"
    reasons: list[str] = Field(default_factory=list)
    protection: float | None = None
    interval: tuple[float, float] | None = None
    by_seed: dict[int, float] = Field(default_factory=dict)
    winners: dict[str, int] = Field(default_factory=dict)
    cells: int = 0
    examples: int = 0
    per_class: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def attacker(self) -> str:
        """The attack for people, with the winner of an ensemble."""
        if self.winners:
            return f"{self.attack}: {max(self.winners, key=lambda name: self.winners[name])}"
        return "no attack" if self.attack == "none" else self.attack

    @property
    def shown(self) -> float:
        """``protection`` clipped to [0, 1]; NaN where there is none."""
        return float("nan") if self.protection is None else clip(self.protection)

    @property
    def bounds(self) -> tuple[float, float]:
        """The clipped interval; all of [0, 1] where none could be computed."""
        low, high = self.interval or (0.0, 1.0)
        return clip(low), clip(high)


class Robust(Entry):
    """The entry with the least protection of several.

    ``low``: the least lower end of the interval of any of them, by which is ranked; an entry
    without an interval has 0. Raw.
    """

    low: float

    @property
    def bounds(self) -> tuple[float, float]:
        """From ``low`` to the upper end of its own interval, clipped."""
        return clip(self.low), super().bounds[1]


class Break(BaseModel):
    """The cheapest attack that pushes protection under 0.5."""

    model_config = ConfigDict(extra="forbid")

    testbed: str
    attack: str
    merger: str
    access: Tier
    examples: int
    per_class: int = 0
    flops: float = 0.0
    seconds: float
    protection: float


class Use(BaseModel):
    """Accuracy after something an honest user does: of the released model, and of the expert."""

    model_config = ConfigDict(extra="forbid")

    released: float
    expert: float

    @property
    def lost(self) -> float:
        """Points that the release loses against the expert."""
        return 100 * (self.expert - self.released)


class Leaks(BaseModel):
    """Share of secrets that come out, on the mean over cells: without merging the release, under
    the attack and merger that bring out most, and of the undefended expert through the same.

    ``kept``: task that users ask of the release → its accuracy and the expert's.
    """

    model_config = ConfigDict(extra="forbid")

    outside: float
    attacked: float
    undefended: float
    kept: dict[str, Use] = Field(default_factory=dict)


class Row(BaseModel):
    """One defense. ``robust[tier]`` is the least protection over attacks and mergers of that tier
    and below, for each tier that was run.

    ``as_published``: unattacked, through the first merger that searches no coefficient.
    ``utility`` and ``expert`` are mean standalone accuracies on the victims' tasks; ``drop`` is
    their difference in points. ``tied`` says that the rank is shared. ``covered``: the share of the
    benefit of merging, over all that the suite asks, that lies in cells which this defense neither
    empties nor leaves out. ``protect_multiple`` is ``protect_seconds`` over what fine-tuning the
    expert took. ``leaks``: of releases that keep secrets. ``quality``: what a
    testbed measures of samples of release, undefended and attacked merge, means over cells.
    """

    model_config = ConfigDict(extra="forbid")

    defense: str
    role: Role = "method"
    track: Track = "weights"
    standing: Standing = "ranked"
    rank: int | None = None
    tied: bool = False
    reason: str = ""
    robust: dict[Tier, Robust] = Field(default_factory=dict)
    robust_task_aware: dict[Tier, Robust] = Field(default_factory=dict)
    unattacked: Entry | None = None
    as_published: Entry | None = None
    broken_by: Break | None = None
    utility: float | None = None
    expert: float | None = None
    drop: float | None = None
    covered: float | None = None
    logit_gap: float | None = None
    protect_seconds: float = 0.0
    protect_multiple: float | None = None
    benign: dict[str, Use] = Field(default_factory=dict)
    leaks: Leaks | None = None
    quality: dict[str, dict[str, float]] = Field(default_factory=dict)
    flags: list[str] = Field(default_factory=list)

    @property
    def tax(self) -> tuple[str, float] | None:
        """The benign use that leaves the release furthest behind the expert, and the points."""
        if not self.benign:
            return None
        use = max(self.benign, key=lambda name: self.benign[name].lost)
        return use, self.benign[use].lost

    @property
    def task_aware(self) -> Robust | None:
        """The least protection under task-aware mergers, whatever the attacker holds."""
        return next(reversed(self.robust_task_aware.values()), None)

    @property
    def place(self) -> str:
        """``2``, ``2=`` where shared, ``–`` without a rank."""
        return "–" if self.rank is None else f"{self.rank}{'=' if self.tied else ''}"


class Leaderboard(BaseModel):
    """Everything a report shows, computed from cells alone.

    ``published``: where the suite has such, the papers' printed figures beside what was measured.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    rows: list[Row] = Field(default_factory=list)
    matrix: list[Entry] = Field(default_factory=list)
    attack_flags: dict[str, list[str]] = Field(default_factory=dict)
    published: list[PublishedLine] = Field(default_factory=list)

    def tiers(self) -> list[Tier]:
        """The tiers that some attack or merger of the run uses."""
        used = {entry.access for entry in self.matrix}
        return [tier for tier in TIERS if tier in used]


def clip(value: float) -> float:
    """Protection as displayed: in [0, 1]."""
    return min(1.0, max(0.0, value))


def band(value: float) -> Literal["holds", "partly", "broken"]:
    """In words: ``holds`` (≥ 0.9), ``partly``, ``broken`` (< 0.5)."""
    return "holds" if value >= HOLDS else "partly" if value >= BROKEN else "broken"
