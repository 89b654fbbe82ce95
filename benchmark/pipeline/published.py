"""Figures that a paper printed, to stand beside what a run measures. No part of the question."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Accuracies or cosines, in %, as printed.
Percent = Field(default=None, ge=0, le=100)


class Published(BaseModel):
    """One line of a paper's table; accuracies in %.

    ``defense``, ``attack`` and ``merger`` are specs of the suite. ``task``: a task's name, or
    ``mean`` over the suite's victims, each in its own merge, or ``all``: over all tasks of a merge,
    and then over victims. ``victim``: whose expert is protected, if that is not the
    task's own. ``partners``: with whom it was merged (empty: whatever the suite merges it with).
    ``coefficient``: the shared λ; None where the source is silent, and then the suite's first one
    is measured. ``testbed``: what it is a figure of, if not simply the suite's: a testbed with its
    parameters, or the name of some other base. ``what``: accuracy of the merge, or of the release
    (after an attack: of the recovered model) used alone; or the same two of the alignment of drawn
    images with their captions, a cosine. ``attacked`` is after ``attack``.
    ``evidence``: how well we know the figure (``paper``: read in it; ``note``: in a third party's
    summary). ``source`` names the work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    defense: str
    attack: str = "none"
    merger: str = "task-arithmetic"
    task: str = "mean"
    victim: str = ""
    partners: tuple[str, ...] = ()
    coefficient: float | None = None
    testbed: str = ""
    what: Literal["merged", "standalone", "alignment", "alignment-alone"] = "merged"
    unprotected: float | None = Percent
    protected: float | None = Percent
    attacked: float | None = Percent
    evidence: Literal["code", "paper", "note"]
    source: str
    arxiv: str = Field(pattern=r"^\d{4}\.\d{4,5}$")

    @model_validator(mode="after")
    def _some(self) -> Published:
        if self.unprotected is None and self.protected is None and self.attacked is None:
            raise ValueError("need a figure: unprotected, protected or attacked")
        if self.attacked is not None and self.attack == "none":
            raise ValueError("a figure after an attack needs the attack's name")
        return self
