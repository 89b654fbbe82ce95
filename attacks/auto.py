"""The standard attacker: a fixed, parameter-free, versioned ensemble of all attacks of a tier."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, Literal

import torch

from benchmark.api import methods
from benchmark.api.contracts import Access, Card, Ensemble, Knowledge
from benchmark.core.state import State

_TIERS = ("weights", "unlabeled", "labeled")


@functools.cache
def _recipe() -> dict[str, Any]:
    text = (resources.files("attacks") / "auto.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@dataclass(frozen=True)
class Auto(Ensemble):
    """Every attack of ``attacks/auto.toml`` up to a tier; validation picks, test measures.

    The first candidate gets the free-rider's whole search. Where that already leaves no less than
    an undefended merge (on all of validation), nothing is left to break and the ensemble stops;
    like AutoAttack, it spends nothing on what is already lost. The cell then used no data.

    Else all candidates are screened: at two of the merger's settings (the one that is best for the
    undefended expert, and the victim at full strength with the least of the partners) they race
    over the validation split, rung by rung, as the settings of one search do. The best of the
    others gets the whole search too, and wins only if it is better on validation by more than a
    standard error: a few examples would else prefer luck to the attack that is strongest by
    construction. In forward passes that is about three times the search of one member alone (five
    times where the merger's coefficients are fixed and a search is one model).

    Attributes:
        tier: what the attacker holds. Each tier tries all of the one below.
    """

    card: ClassVar[Card] = Card(
        summary="the standard attacker: every attack of a tier, the best picked on validation",
        fidelity="ours",
        notes="after AutoAttack (Croce & Hein 2020, arXiv 2003.01690): no parameters, one flag",
    )
    access: ClassVar[Access] = Access.WEIGHTS
    version: ClassVar[str] = _recipe()["version"]

    tier: Literal["weights", "unlabeled", "labeled"] = "weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "access", Access[self.tier.upper()])

    @property
    def candidates(self) -> tuple[str, ...]:
        tiers = _TIERS[: _TIERS.index(self.tier) + 1]
        return tuple(spec for tier in tiers for spec in _recipe()[tier])

    @property
    def challengers(self) -> int:
        return int(_recipe()["challengers"])

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        """Where nothing can be evaluated (two folders): its first candidate."""
        return methods.attack(self.candidates[0]).method.recover(released, knowledge, rng)
