"""What a run writes: one typed record per cell. Aggregates are always recomputed from cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2

#: Attacks that a defense which changes modules must stand to be ranked: its shipped tensors and its
#: forward are public.
OF_MODULES = ("read-shipped", "auto(tier=unlabeled)")

#: In place of a coefficient: the shared one that validation chose.
SEARCHED = "searched"
#: Models of whose samples a cell states the quality.
QUALITIES = ("released", "undefended", "attacked")

Status = Literal["ok", "no-benefit", "error", "skipped"]


def scored(victim: str, partners: Sequence[str], duties: Sequence[str]) -> tuple[str, ...]:
    """The tasks on which a free-rider's gain is counted: of a victim with duties its own alone."""
    return (victim,) if duties else (victim, *partners)


class Seconds(BaseModel):
    """Wall-clock seconds of one cell's own work (0 where it was shared or cached).

    ``expert`` is what fine-tuning the victim took, to which ``protect`` is compared.
    """

    model_config = ConfigDict(extra="forbid")
    expert: float = 0.0
    protect: float = 0.0
    recover: float = 0.0
    merge: float = 0.0
    evaluate: float = 0.0


class Spent(BaseModel):
    """What the attack used: examples, optimisation steps, model FLOPs.

    ``examples`` counts those of all tasks; ``per_class`` the labelled ones of each class.
    """

    model_config = ConfigDict(extra="forbid")
    examples: int = 0
    per_class: int = 0
    steps: int = 0
    flops: float = 0.0


class Search(BaseModel):
    """The free-rider's search over merges: what it tried, what it spent, what it may have lost.

    ``settings`` were tried, of which ``failed`` gave no model that runs (NaN, an exception).
    ``passes`` are forward passes on validation, ``exhaustive`` what trying everything on everything
    takes; ``bound``: how much better a setting that was dropped may be (in units of G, with
    probability 98 %; :mod:`benchmark.evaluation.search`).
    """

    model_config = ConfigDict(extra="forbid")
    settings: int = 0
    failed: int = 0
    passes: int = 0
    exhaustive: int = 0
    bound: float = 0.0


class Hashes(BaseModel):
    """sha256 over the tensors of each State."""

    model_config = ConfigDict(extra="forbid")
    base: str = ""
    expert: str = ""
    released: str = ""
    recovered: str = ""
    merged: str = ""


class Cell(BaseModel):
    """One testbed × victim × partners × seed × defense × attack × merger.

    ``accuracy`` and ``normalized``: test accuracy per task of the model the free-rider ends with
    (validation picks it). ``gain`` is G(attacked), the mean of ``normalized``; ``gain_undefended``
    and ``gain_outside`` are G(undefended) and G0; ``gain_reference`` is G0 with the undefended
    expert as release, on which hangs whether the cell counts. ``protection`` is the raw value
    1 − (G(attacked) − G0)/(G(undefended) − G0), not clipped
    (:class:`benchmark.evaluation.scoring.Gains`). ``changes_modules``: users of the defense run
    other modules than mergers see. ``one_coefficient``: the merger gives all members one
    coefficient and searches none, as most papers do. ``choice`` and ``outside_choice`` say which
    candidate won and which outside option G0 is. ``merged_setting`` and ``merged_accuracy``: the
    best setting that does use the victim (its accuracy only where it was measured: it won, or
    nothing was defended).
    ``fixed``: accuracy on the victim's task at the papers' coefficients, and at the shared one that
    is best on validation (``SEARCHED``).
    ``utility`` and ``standalone``: accuracy of the release, and of the recovered model, used alone.
    ``seen``: accuracy of a release with foreign modules on the training inputs that attackers get.
    ``logit_gap``, ``recovered_gap``: max relative |Δlogit| of release against expert, and of the
    recovered model against the release. ``qk_gauge``: the group to which the architecture confines
    a lock on Q and K: general, rotary or sign. ``ensemble``: for an attack that is one, its
    version, which of its attacks won, the screening's scores and failures, and forward passes.
    ``bf16_gap`` and ``bf16_gap_expert``: what storing release and expert in bfloat16 costs,
    likewise. ``correct``: per-example test outcomes as hex, from which every accuracy and interval
    is recomputed: of the models chosen when attacked, undefended, outside and (outside, with the
    undefended expert as release) reference, of expert and base on every task, and of the
    ``released`` model as shipped on the victim's. ``benign``: what an honest user did (bf16, int8,
    int4, pruned, fine-tuned, lora) → accuracy after it of ``released`` (as shipped) and of the
    unprotected ``expert``; in unattacked cells of the suite's first merger, if the suite asks.
    ``notes``: what the defense reported of its making, such as a search for its weight, and
    ``benign.<use>.<model>``: why a use is left out or counts as 0.
    ``duties``: of a victim that keeps secrets, the tasks on which its utility is judged. Then what
    is right on the victim's task is a leak, G is the share that leaks, partners' tasks play no
    part, and ``correct`` has expert and ``released`` on the duties too.
    ``draws``: the testbed is of generators.
    ``quality``: where the testbed measures such, of what ``QUALITIES`` make on the victim's task;
    ``pictures``: a few of it (:mod:`benchmark.core.pictures`), from the same noise.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    testbed: str
    victim: str
    partners: list[str]
    seed: int
    defense: str
    attack: str
    merger: str
    access: Literal["weights", "unlabeled", "labeled"]
    task_id: bool = False
    changes_modules: bool = False
    one_coefficient: bool = False
    status: Status = "ok"
    reason: str = ""
    setting: dict[str, object] = Field(default_factory=dict)
    choice: str = ""
    outside_choice: str = ""
    accuracy: dict[str, float] = Field(default_factory=dict)
    normalized: dict[str, float] = Field(default_factory=dict)
    gain: float | None = None
    gain_undefended: float | None = None
    gain_outside: float | None = None
    gain_reference: float | None = None
    protection: float | None = None
    protection_ci: tuple[float, float] | None = None
    merged_accuracy: dict[str, float] = Field(default_factory=dict)
    merged_setting: dict[str, object] = Field(default_factory=dict)
    fixed: dict[str, dict[str, float]] = Field(default_factory=dict)
    expert_accuracy: dict[str, float] = Field(default_factory=dict)
    zero_shot: dict[str, float] = Field(default_factory=dict)
    utility: float | None = None
    utility_drop: float | None = None
    standalone: float | None = None
    seen: float | None = None
    qk_gauge: str = ""
    logit_gap: float | None = None
    bf16_gap: float | None = None
    bf16_gap_expert: float | None = None
    recovered_gap: float | None = None
    ensemble: dict[str, object] = Field(default_factory=dict)
    correct: dict[str, dict[str, str]] = Field(default_factory=dict)
    n_val: int = 0
    n_test: int = 0
    sha256: Hashes = Field(default_factory=Hashes)
    seconds: Seconds = Field(default_factory=Seconds)
    budget: Spent = Field(default_factory=Spent)
    search: Search = Field(default_factory=Search)
    benign: dict[str, dict[str, float]] = Field(default_factory=dict)
    flags: list[str] = Field(default_factory=list)
    notes: dict[str, object] = Field(default_factory=dict)
    duties: list[str] = Field(default_factory=list)
    draws: bool = False
    quality: dict[str, dict[str, float]] = Field(default_factory=dict)
    pictures: dict[str, str] = Field(default_factory=dict)

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks on which the free-rider's gain is counted."""
        return scored(self.victim, self.partners, self.duties)
