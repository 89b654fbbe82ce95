"""The rational free-rider: tries all candidates on validation, keeps the best, and is tested once.

An attack that refines the merged model also refines the outside options with the same data and
steps, so that data alone never counts as breaking a defense.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmark.api import methods
from benchmark.api.contracts import Access, Merger, Setting
from benchmark.api.methods import Named
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError
from benchmark.core.records import Search, scored
from benchmark.evaluation.scoring import accuracies, units
from benchmark.evaluation.search import Racer, race
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate
from benchmark.pipeline.measure import Measure
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import Workbench

Ranked = list[tuple[Candidate, float]]


class Skip(UnmergeBenchError):
    """The merger does not apply: these cells make no sense, and nothing failed."""


@dataclass
class Outcome:
    """The candidate that validation picked, its validation score, and its test outcomes by task.

    ``merge`` is the best candidate that uses the victim, whether or not it won; ``search`` is what
    the search over merges took.
    """

    best: Candidate
    score: float
    correct: dict[str, np.ndarray]
    merge: Candidate | None = None
    spent: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    search: Search = field(default_factory=Search)


class FreeRider:
    """Searches on one testbed under one suite's validation and test sizes; remembers outcomes.

    Its attacks are single ones: an ensemble is a search over those
    (:mod:`benchmark.pipeline.ensemble`).
    """

    def __init__(self, bench: Workbench, suite: Suite) -> None:
        self.bench = bench
        self.measure = Measure(bench)
        self.suite = suite
        self._none = methods.defense("none"), methods.attack("none")
        self._outcomes: dict[tuple[object, ...], Outcome] = {}

    def check(self, group: Group) -> None:
        """Raise UsageError if a task has fewer validation examples than the search wants."""
        wanted = self.suite.validation_rungs[-1]
        for task in self.scored(group):
            found = len(self.measure.split(task, "validation"))
            if found < wanted:
                raise UsageError(
                    f"task {task} has {found} validation examples, the suite's last validation "
                    f"rung is {wanted}; lower it"
                )

    def outside(self, at: Situation) -> Outcome:
        """G0: the best without merging the victim, with the data and compute of the attack."""
        # Weights alone buy nothing from the base; data and training may.
        buys = at.attack.method.access > Access.WEIGHTS
        key = ("outside", *at.names) if buys else ("outside", "", *at.names[:1], *at.names[2:])
        if key not in self._outcomes:
            settings = self.settings(at.merger, at.group)
            options = made.outside(self.bench, at, settings)
            if self.duties(at.group):
                options += made.released_scaled(self.bench, at, settings)
            if buys:
                options += made.controls(self.bench, at, settings)
            # Few, and shared by all defenses: no racing, which could lose one to a bad start.
            ranked, _ = self._race([], at, known=options)
            if at.attack.method.refines:
                best_of_each: dict[str, Candidate] = {}
                for option, _ in ranked:
                    best_of_each.setdefault(option.kind, option)
                after = [made.refined(self.bench, at, one) for one in best_of_each.values()]
                ranked, _ = self._race([], at, known=[*after, ranked[0][0]])
            self._outcomes[key] = self._outcome(ranked, at)
        return self._outcomes[key]

    def solve(self, at: Situation, outside: Candidate | None = None) -> Outcome:
        """G: the best of all, merging the victim or not.

        ``outside``: the best outside option, if it is not that of this attack alone.
        """
        outside = outside or self.outside(at).best
        key = ("all", *at.names, outside.content)
        if key not in self._outcomes:
            self._outcomes[key] = self._solved(at, outside)
        return self._outcomes[key]

    def _solved(self, at: Situation, outside: Candidate) -> Outcome:
        start = time.perf_counter()
        base, parts = made.members(self.bench.recovered(at))
        at = made.merging(self.bench, at)
        space = self.settings(at.merger, at.group)
        # The victim without any partner is no merge: used alone it is an outside option.
        settings = [s for s in space if s.coefficients[0] and any(s.coefficients[1:])]
        options = made.merges(self.bench, at, base, parts, settings, "merge")
        scaled = made.scaled(self.bench, at, base, parts, space, "merge")
        ranked, search = self._race(options, at, known=[outside], more=scaled)
        raced, merge = ranked, _best_merge(ranked)
        spent: Counter[str] = Counter()
        if at.merger.method.access > Access.WEIGHTS:
            spent.update(made.spent(self.bench, merge))
        if at.attack.method.refines:
            refined = made.refined(self.bench, at, merge)
            spent.update(made.spent(self.bench, refined))
            ranked, _ = self._race([refined, merge], at, known=[outside])
            merge = _best_merge(ranked)
        outcome = self._outcome(ranked, at)
        if self.duties(at.group):
            outcome = self._as_undefended(outcome, raced, at)
        outcome.merge, outcome.spent, outcome.search = merge, dict(spent), search
        outcome.seconds = time.perf_counter() - start
        return outcome

    def undefended(self, at: Situation) -> Outcome:
        """What the free-rider would have had if nothing defended the victim, unattacked."""
        defense, attack = self._none
        return self.solve(at.with_defense(defense).under(attack))

    def _as_undefended(self, found: Outcome, ranked: Ranked, at: Situation) -> Outcome:
        """Of secrets: the better, on test, of ``found`` and what brings out most undefended.

        An owner who tells canaries from others can let them say that nothing comes out, or that all
        does without a merge. What works on undefended models anybody can try; that the better of
        two is taken never helps a defense.
        """
        if at.defense.spec == self._none[0].spec:
            return found
        known = self.undefended(at).merge
        for option, score in ranked:
            if known is not None and option.kind == "merge" and option.setting == known.setting:
                other, victim = self._outcome([(option, score)], at), at.group.victim
                if other.correct[victim].mean() > found.correct[victim].mean():
                    return other
        return found

    def settings(self, merger: Named[Merger], group: Group) -> list[Setting]:
        """The search space for this many members.

        Raises:
            Skip: the merger does not merge so many.
        """
        try:
            return merger.method.search_space(1 + len(group.partners))
        except MethodError as error:
            raise Skip(str(error)) from None

    def duties(self, group: Group) -> tuple[str, ...]:
        """The tasks that the victim's users ask of it; none unless the victim keeps secrets."""
        return tuple(self.bench.testbed.duties.get(group.victim, ()))

    def scored(self, group: Group) -> tuple[str, ...]:
        """The tasks on which the free-rider's gain is counted."""
        return scored(group.victim, group.partners, self.duties(group))

    def units(self, at: Situation) -> dict[str, float]:
        """Task → validation accuracy that counts as 1."""
        own = accuracies(self.experts(at, "validation"))
        return units(own, secrets=bool(self.duties(at.group)))

    def validated(
        self, candidate: Candidate, unit: dict[str, float], pieces: Sequence[range]
    ) -> np.ndarray:
        """Normalised outcome per validation example of ``pieces``, averaged over tasks: (n,)."""
        racer = Racer(candidate.name)
        for task in unit:
            for rows in pieces:
                racer.extend(task, self.bits(candidate, task, "validation", rows))
        return racer.outcomes(unit)

    def rungs(self) -> list[range]:
        """The validation split in the pieces that the race asks for, so that they are shared."""
        stops = self.suite.validation_rungs
        return [range(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]

    def experts(self, at: Situation, split: str) -> dict[str, np.ndarray]:
        """Outcomes of the expert of each scored task on its own task."""
        out = {}
        for task in self.scored(at.group):
            expert = self.bench.expert(task)
            parts = self.rungs() if split == "validation" else [self.rows(task)]
            pieces = [self.measure.of(expert, task, split, rows) for rows in parts]
            out[task] = np.concatenate(pieces)
        return out

    def rows(self, task: str) -> range:
        """The test examples that count: as many as the suite asks for and the task has."""
        return range(min(self.suite.test, len(self.measure.split(task, "test"))))

    def test(self, candidate: Candidate, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """Test outcomes by task."""
        return {task: self.bits(candidate, task, "test", self.rows(task)) for task in tasks}

    def bits(self, candidate: Candidate, task: str, split: str, rows: range) -> np.ndarray:
        """Which examples of ``rows`` a candidate gets right."""
        return self.measure.bits(candidate.content, candidate.build, task, split, rows)

    def _race(
        self,
        options: Sequence[Candidate],
        at: Situation,
        known: Sequence[Candidate] = (),
        more: Sequence[Candidate] = (),
    ) -> tuple[Ranked, Search]:
        """All that can be run with their validation scores, in the race's order; and what the
        search over ``options`` and ``more`` took.

        ``known`` ones are never dropped: they were seen whole before, or are to be. ``more``: hang
        on no merger, so that they say nothing about whether it works.

        Raises:
            MethodError: of ``options``, or of ``known`` if there are no others, none can be run.
        """
        first, safe = len(more), len(more) + len(options)
        by_name = {str(i): c for i, c in enumerate([*more, *options, *known])}
        racers = [Racer(name, safe=int(name) >= safe) for name in by_name]
        unit = self.units(at)
        found = race(
            racers,
            lambda name, task, rows: self.bits(by_name[name], task, "validation", rows),
            unit,
            self.suite.validation_rungs,
        )
        asked = range(first, safe) or range(safe, len(by_name))
        failed = [reason for name, reason in found.failed.items() if int(name) in asked]
        if len(failed) == len(asked):
            raise MethodError(f"none of {len(asked)} candidates can be run ({failed[0]})")
        search = Search(
            settings=safe,
            failed=len(failed),
            passes=found.passes,
            exhaustive=found.exhaustive,
            bound=found.bound,
        )
        return [(by_name[r.name], r.score(unit)) for r in found.ranked], search

    def _outcome(self, ranked: Ranked, at: Situation) -> Outcome:
        best, score = ranked[0]
        return Outcome(best, score, self.test(best, self.scored(at.group)))


def _best_merge(ranked: Ranked) -> Candidate:
    return next(option for option, _ in ranked if option.kind == "merge")
