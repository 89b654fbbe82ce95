"""Who protects what how, and who merges it with what: where a free-rider finds himself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmark.api.contracts import Attack, Defense, Merger
from benchmark.api.methods import Named
from benchmark.pipeline.suite import Group


@dataclass(frozen=True)
class Situation:
    """One defense, attack, merger, group and seed."""

    group: Group
    seed: int
    defense: Named[Defense]
    attack: Named[Attack]
    merger: Named[Merger]

    @property
    def names(self) -> tuple[object, ...]:
        """What tells two situations of one run apart."""
        methods = self.defense.spec, self.attack.spec, self.merger.spec
        return (*methods, self.group.victim, self.group.partners, self.seed)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The victim's task, then the partners'."""
        return (self.group.victim, *self.group.partners)

    def under(self, attack: Named[Attack]) -> Situation:
        """The same with another attack."""
        return replace(self, attack=attack)

    def with_defense(self, defense: Named[Defense]) -> Situation:
        """The same with another defense."""
        return replace(self, defense=defense)
