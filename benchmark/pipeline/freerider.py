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
from benchmark.api.contracts import Access, Attack, Defense, Ensemble, Merger, Setting
from benchmark.api.methods import Named
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError, first_line
from benchmark.core.records import Search
from benchmark.evaluation.scoring import accuracies
from benchmark.evaluation.search import Racer, race
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate, Skip
from benchmark.pipeline.ensemble import Screening, screen
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import Workbench

Ranked = list[tuple[Candidate, float]]


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
    """Searches on one testbed under one suite's validation and test sizes; remembers outcomes."""

    def __init__(self, bench: Workbench, suite: Suite) -> None:
        self.bench = bench
        self.suite = suite
        self._outcomes: dict[tuple[str, ...], Outcome] = {}
        self._chosen: dict[tuple[str, ...], tuple[Named[Attack], dict[str, object]]] = {}

    def check(self, group: Group) -> None:
        """Raise UsageError if a task has fewer validation examples than the search wants."""
        wanted = self.suite.validation_rungs[-1]
        for task in (group.victim, *group.partners):
            found = self.bench.size(task, "validation")
            if found < wanted:
                raise UsageError(
                    f"task {task} has {found} validation examples, the suite's last validation "
                    f"rung is {wanted}; lower it"
                )

    def outside(
        self,
        defense: Named[Defense],
        attack: Named[Attack],
        merger: Named[Merger],
        group: Group,
        seed: int,
    ) -> Outcome:
        """G0: the best without merging the victim, with the data and compute of the attack.

        For an ensemble: the best over its attacks, or that of its first if no other was tried.
        """
        if isinstance(attack.method, Ensemble) and attack.method.access > Access.WEIGHTS:
            first = methods.attack(attack.method.candidates[0])
            if self._undone(defense, first, merger, group, seed):
                return self.outside(defense, first, merger, group, seed)
            parts = [methods.attack(spec) for spec in attack.method.candidates]
            costly = [part for part in parts if part.method.access > Access.WEIGHTS]
            found = [self.outside(defense, part, merger, group, seed) for part in costly]
            return max(found, key=lambda outcome: outcome.score)
        refines = attack.method.refines
        # Weights alone buy nothing from the base; data and training may.
        means = attack.spec if attack.method.access > Access.WEIGHTS else ""
        key = ("outside", defense.spec, means, merger.spec, repr(group), str(seed))
        if key not in self._outcomes:
            shipped = self.bench.shipped(defense, group.victim, seed)
            settings = self.settings(merger, group)
            options = made.outside(self.bench, shipped, merger, settings, group, seed)
            if means:
                options += made.controls(self.bench, attack, merger, settings, group, seed)
            # Few, and shared by all defenses: no racing, which could lose one to a bad start.
            ranked, _ = self._race([], group, known=options)
            if refines:
                best_of_each: dict[str, Candidate] = {}
                for option, _ in ranked:
                    best_of_each.setdefault(option.kind, option)
                after = [
                    made.refined(self.bench, option, attack, group, seed)
                    for option in best_of_each.values()
                ]
                ranked, _ = self._race([], group, known=[*after, ranked[0][0]])
            self._outcomes[key] = self._outcome(ranked, group)
        return self._outcomes[key]

    def chosen(
        self,
        defense: Named[Defense],
        attack: Named[Attack],
        merger: Named[Merger],
        group: Group,
        seed: int,
    ) -> tuple[Named[Attack], dict[str, object]]:
        """The attack itself, or the one an ensemble picks here, with the screening's report."""
        if not isinstance(attack.method, Ensemble):
            return attack, {}
        key = (defense.spec, attack.spec, merger.spec, repr(group), str(seed))
        if key not in self._chosen:
            first = methods.attack(attack.method.candidates[0])
            if self._undone(defense, first, merger, group, seed):
                report = Screening(attack.method.version, [first.spec], first.spec, stopped=True)
                passes = self.situation(defense, first, merger, group, seed).search.passes
                report.searches[first.spec] = passes
                winner = first
            else:
                merge = self._undefended(merger, group, seed).merge
                favourite = merge.setting if merge else None
                report = screen(self, defense, attack, merger, group, seed, favourite)
                winner = self._final(report, defense, merger, group, seed)
            self._chosen[key] = winner, report.to_dict()
        return self._chosen[key]

    def _undefended(self, merger: Named[Merger], group: Group, seed: int) -> Outcome:
        """What the free-rider would have had if nothing defended the victim."""
        none = methods.defense("none"), methods.attack("none")
        return self.situation(*none, merger, group, seed)

    def _undone(
        self,
        defense: Named[Defense],
        first: Named[Attack],
        merger: Named[Merger],
        group: Group,
        seed: int,
    ) -> bool:
        """Whether ``first`` alone leaves, on all of validation, no less than an undefended merge.

        Then there is no protection left for another attack to take. Like AutoAttack, which spends
        nothing more on an example that is already misclassified, this is the benchmark's knowledge
        and not the attacker's: it saves time and never picks among attacks.
        """
        try:
            found = self.situation(defense, first, merger, group, seed)
        except UnmergeBenchError:
            return False  # the screening says so, and goes on without it
        return found.score >= self._undefended(merger, group, seed).score

    def _final(
        self,
        report: Screening,
        defense: Named[Defense],
        merger: Named[Merger],
        group: Group,
        seed: int,
    ) -> Named[Attack]:
        """Each finalist's whole search; a challenger must beat the first by a standard error."""
        expert = accuracies(self.experts(group, "validation"))
        leading: np.ndarray | None = None
        for spec in report.finalists:
            try:
                outcome = self.situation(defense, methods.attack(spec), merger, group, seed)
            except UnmergeBenchError as error:
                report.failed[spec] = first_line(error)
                continue
            report.searches[spec] = outcome.search.passes
            mine = self.validated(outcome.best, expert, self._rungs())
            gap = 0.0 if leading is None else mine - leading
            error_of_mean = np.std(gap, ddof=1) / len(mine) ** 0.5 if leading is not None else 0.0
            if leading is None or np.mean(gap) > error_of_mean:
                report.winner, leading = spec, mine
        if not report.winner:
            raise MethodError(f"every finalist failed: {report.failed}")
        return methods.attack(report.winner)

    def situation(
        self,
        defense: Named[Defense],
        attack: Named[Attack],
        merger: Named[Merger],
        group: Group,
        seed: int,
    ) -> Outcome:
        """G: the best of all, merging the victim or not."""
        key = ("all", defense.spec, attack.spec, merger.spec, repr(group), str(seed))
        if key in self._outcomes:
            return self._outcomes[key]
        outside = self.outside(defense, attack, merger, group, seed).best
        start = time.perf_counter()
        attack, _ = self.chosen(defense, attack, merger, group, seed)
        base, parts = made.members(self.bench.recovered(defense, attack, group, seed))
        merger = Named(merger.spec, attack.method.merging(merger.method, self.bench.anatomy))
        # The victim without any partner is no merge: used alone it is an outside option.
        settings = [
            s for s in self.settings(merger, group) if s.coefficients[0] and any(s.coefficients[1:])
        ]
        options = made.merges(self.bench, merger, base, parts, settings, group, seed, "merge")
        ranked, search = self._race(options, group, known=[outside])
        merge = next(option for option, _ in ranked if option.kind == "merge")
        spent: Counter[str] = Counter()
        if merger.method.access > Access.WEIGHTS:
            spent.update(made.spent(self.bench, merge))
        if attack.method.refines:
            refined = made.refined(self.bench, merge, attack, group, seed)
            spent.update(made.spent(self.bench, refined))
            ranked, _ = self._race([refined, merge], group, known=[outside])
            merge = next(option for option, _ in ranked if option.kind == "merge")
        outcome = self._outcome(ranked, group)
        outcome.merge, outcome.spent, outcome.search = merge, dict(spent), search
        outcome.seconds = time.perf_counter() - start
        self._outcomes[key] = outcome
        return outcome

    def settings(self, merger: Named[Merger], group: Group) -> list[Setting]:
        """The search space for this many members.

        Raises:
            Skip: the merger does not merge so many.
        """
        try:
            return merger.method.search_space(1 + len(group.partners))
        except MethodError as error:
            raise Skip(str(error)) from None

    def validated(
        self, candidate: Candidate, expert: dict[str, float], pieces: Sequence[range]
    ) -> np.ndarray:
        """Normalised outcome per validation example of ``pieces``, averaged over tasks: (n,)."""
        racer = Racer(candidate.name)
        for task in expert:
            for rows in pieces:
                bits = self.bench.bits(candidate.content, candidate.build, task, "validation", rows)
                racer.extend(task, bits)
        return racer.outcomes(expert)

    def _rungs(self) -> list[range]:
        """The validation split in the pieces that the race asks for, so that they are shared."""
        stops = self.suite.validation_rungs
        return [range(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]

    def experts(self, group: Group, split: str) -> dict[str, np.ndarray]:
        """Outcomes of each task's own expert on its own task."""
        out = {}
        for task in (group.victim, *group.partners):
            expert = self.bench.expert(task)
            parts = self._rungs() if split == "validation" else [self.rows(task)]
            pieces = [
                self.bench.bits(expert.sha256, expert.state, task, split, rows) for rows in parts
            ]
            out[task] = np.concatenate(pieces)
        return out

    def rows(self, task: str) -> range:
        """The test examples that count: as many as the suite asks for and the task has."""
        return range(min(self.suite.test, self.bench.size(task, "test")))

    def test(self, candidate: Candidate, group: Group) -> dict[str, np.ndarray]:
        """Test outcomes by task."""
        return {
            task: self.bench.bits(candidate.content, candidate.build, task, "test", self.rows(task))
            for task in (group.victim, *group.partners)
        }

    def _race(
        self, options: Sequence[Candidate], group: Group, known: Sequence[Candidate] = ()
    ) -> tuple[Ranked, Search]:
        """All with their validation scores, whole ones first, best first; and what the search
        over ``options`` took.

        ``known`` ones are never dropped: they were seen whole before, or are to be.
        """
        by_name = {str(i): c for i, c in enumerate([*options, *known])}
        racers = [Racer(name, safe=int(name) >= len(options)) for name in by_name]
        expert = accuracies(self.experts(group, "validation"))

        def correct(name: str, task: str, rows: range) -> np.ndarray:
            option = by_name[name]
            return self.bench.bits(option.content, option.build, task, "validation", rows)

        found = race(racers, correct, expert, self.suite.validation_rungs)
        scored = [(r.seen, float(r.outcomes(expert).mean()), by_name[r.name]) for r in racers]
        scored.sort(key=lambda entry: (-entry[0], -entry[1]))
        search = Search(
            settings=len(options),
            passes=found.passes,
            exhaustive=found.exhaustive,
            bound=found.bound,
        )
        return [(option, score) for _, score, option in scored], search

    def _outcome(self, ranked: Ranked, group: Group) -> Outcome:
        best, score = ranked[0]
        return Outcome(best, score, self.test(best, group))
