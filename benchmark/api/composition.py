"""``a+b``: defenses applied one after another, and attacks likewise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import (
    Access,
    Attack,
    Card,
    Defense,
    Ensemble,
    Knowledge,
    Members,
    Merger,
    Victim,
)
from benchmark.core.errors import UsageError
from benchmark.core.state import State


@dataclass(frozen=True)
class DefenseChain(Defense):
    """Each part protects what the part before it released. ``card`` combines those of the parts."""

    parts: tuple[Defense, ...]
    card: ClassVar[Card] = Card("several defenses, one after another")

    def __post_init__(self) -> None:
        # The class attribute is what the contract asks for; each chain has its own beside it.
        object.__setattr__(self, "card", combined_card([part.card for part in self.parts]))

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return _protected(self.parts, victim, rng)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        """What the last part ships; only it may change modules."""
        before = _protected(self.parts[:-1], victim, rng)
        return self.parts[-1].shipped(replace(victim, expert=before), released, rng)

    @property
    def changes_modules(self) -> bool:
        return self.parts[-1].changes_modules


@dataclass(frozen=True)
class AttackChain(Attack):
    """Each part attacks what the part before it recovered, then each refines the merged model.

    Every part sees the members as the part before it left them, and no more than its own access
    tier; all charge one budget. ``access`` is the highest tier of the parts.
    """

    parts: tuple[Attack, ...]
    card: ClassVar[Card] = Card("several attacks, one after another")
    access: ClassVar[Access] = Access.WEIGHTS

    def __post_init__(self) -> None:
        object.__setattr__(self, "card", combined_card([part.card for part in self.parts]))
        object.__setattr__(self, "access", max(part.access for part in self.parts))

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return self.members(released, knowledge, rng).released

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        members = Members(knowledge.base, released, knowledge.partners)
        for part in self.parts:
            seen = _seen_by(part, knowledge, members)
            members = part.members(members.released, seen, rng)
        return members

    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        for part in self.parts:
            merger = part.merging(merger, anatomy)
        return merger

    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        for part in self.parts:
            merged = part.refine(merged, _seen_by(part, knowledge), rng)
        return merged

    @property
    def refines(self) -> bool:
        return any(part.refines for part in self.parts)


def chain_defenses(parts: tuple[Defense, ...]) -> Defense:
    """The composite of at least one defense.

    Raises:
        UsageError: an order in which one part would undo another.
    """
    for part in parts[1:]:
        if part.card.trains:
            raise UsageError(
                f"{part} trains from the base, which undoes the parts before it; put it first"
            )
    for part in parts[:-1]:
        if part.changes_modules:
            raise UsageError(f"{part} changes modules, which no other part can read; put it last")
    return DefenseChain(parts)


def _protected(parts: Sequence[Defense], victim: Victim, rng: torch.Generator) -> State:
    released = victim.expert
    for part in parts:
        released = part.protect(replace(victim, expert=released), rng)
    return released


def chain_attacks(parts: tuple[Attack, ...]) -> Attack:
    """The composite of at least one attack.

    Raises:
        UsageError: a part is an ensemble, which is a search and not one attack.
    """
    for part in parts:
        if isinstance(part, Ensemble):
            raise UsageError(f"{part} is an ensemble and cannot be part of another attack")
    return AttackChain(parts)


def combined_card(cards: Sequence[Card]) -> Card:
    """The card of a chain: exact if all parts are, ranked if any is, as faithful as the least."""

    def joined(values: Sequence[str], mark: str = "; ") -> str:
        return mark.join(dict.fromkeys(value for value in values if value))

    fidelity: Literal["faithful", "reconstruction", "ours"] = "ours"
    if any(card.fidelity == "reconstruction" for card in cards):
        fidelity = "reconstruction"
    elif all(card.fidelity == "faithful" for card in cards):
        fidelity = "faithful"
    role: Literal["method", "control", "reference"] = "reference"
    if any(card.role == "method" for card in cards):
        role = "method"
    elif any(card.role == "control" for card in cards):
        role = "control"
    return Card(
        summary=joined([card.summary.rstrip(".") for card in cards], ", then "),
        paper=joined([card.paper for card in cards]),
        authors=joined([card.authors for card in cards]),
        arxiv=joined([card.arxiv for card in cards], ", "),
        fidelity=fidelity,
        exact=all(card.exact for card in cards),
        trains=any(card.trains for card in cards),
        locks=any(card.locks for card in cards),
        architectures=joined([c.architectures for c in cards if c.architectures != "any"]) or "any",
        role=role,
        licence=joined([card.licence for card in cards], " and "),
        notes=joined([card.notes for card in cards]),
    )


def _seen_by(part: Attack, knowledge: Knowledge, members: Members | None = None) -> Knowledge:
    """``knowledge`` cut to the tier of ``part``; the budget object is shared, so it adds up."""
    seen = copy.copy(knowledge)
    seen.access = min(knowledge.access, part.access)
    if members is not None:
        seen.base, seen.partners = members.base, members.partners
    return seen
