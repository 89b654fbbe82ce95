"""What an attack gets, be it one or a search over many: an ensemble picks on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from benchmark.api import methods
from benchmark.api.contracts import Access, Attack, Ensemble, Setting
from benchmark.api.methods import Named
from benchmark.core.errors import MethodError, described, stop_if_serious
from benchmark.evaluation.search import Racer, race
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate
from benchmark.pipeline.freerider import FreeRider, Outcome
from benchmark.pipeline.situation import Situation

#: Of the merges of a screening so many go on from one rung to the next, against half in a search:
#: it has to name one challenger, and costs about as much as one search does.
SCREENED = 0.25


@dataclass
class Screening:
    """What an ensemble did: finalists, winner, scores, failures, forward passes.

    ``stopped``: its first candidate alone did, and the others were not looked at. ``scores``:
    validation score by candidate, the race's best first, over as much as it saw. ``shared``:
    passes of the finalists in the screening, which their whole searches do not repeat.
    ``searches``: passes of each finalist's search.
    """

    version: str
    finalists: list[str] = field(default_factory=list)
    winner: str = ""
    stopped: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    shared: int = 0
    searches: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {
            "version": self.version,
            "winner": self.winner,
            "stopped": self.stopped,
            "finalists": self.finalists,
            "scores": self.scores,
            "failed": self.failed,
            "passes": self.passes + sum(self.searches.values()) - self.shared,
            "member_passes": max(self.searches.values(), default=0),
        }


@dataclass(frozen=True)
class Solved:
    """What a free-rider got, with which single attack, over which outside option.

    ``reference``: the outside option with the undefended expert as release, by the same means.
    ``report``: what an ensemble did, else nothing.
    """

    attack: Named[Attack]
    outcome: Outcome
    outside: Outcome
    reference: Outcome
    report: dict[str, object] = field(default_factory=dict)


class Attackers:
    """Every attack's result on one free-rider's testbed; an ensemble's choice is remembered."""

    def __init__(self, rider: FreeRider) -> None:
        self.rider = rider
        self._solved: dict[tuple[object, ...], Solved] = {}
        self._none = methods.defense("none")

    def solve(self, at: Situation) -> Solved:
        """G(attacked) and G0 of a situation.

        Raises:
            MethodError: the attack failed, or every attack of an ensemble did.
        """
        if not isinstance(at.attack.method, Ensemble):
            rider, open_ = self.rider, at.with_defense(self._none)
            return Solved(at.attack, rider.solve(at), rider.outside(at), rider.outside(open_))
        if at.names not in self._solved:
            report = self._choose(at)
            winner = at.under(methods.attack(report.winner))
            outside = self._outside(at, report)
            reference = self._outside(at.with_defense(self._none), report)
            outcome = self.rider.solve(winner, outside.best)
            self._solved[at.names] = Solved(
                winner.attack, outcome, outside, reference, report.to_dict()
            )
        return self._solved[at.names]

    def _choose(self, at: Situation) -> Screening:
        ensemble = cast(Ensemble, at.attack.method)
        first = ensemble.candidates[0]
        report = Screening(ensemble.version)
        if self._undone(at.under(methods.attack(first))):
            found = self.rider.solve(at.under(methods.attack(first)))
            report.finalists, report.winner, report.stopped = [first], first, True
            report.searches[first] = found.search.passes
        else:
            self._screen(at, report)
            self._final(at, report)
        return report

    def _undone(self, at: Situation) -> bool:
        """Whether one attack alone leaves, on all of validation, no less than an undefended merge.

        Then there is no protection left for another attack to take. Like AutoAttack, which spends
        nothing more on an example that is already misclassified, this is the benchmark's knowledge
        and not the attacker's: it saves time and never picks among attacks.
        """
        undefended = self.rider.undefended(at)  # no attack's failure: it must not be passed over
        try:
            found = self.rider.solve(at)
        except Exception as error:
            stop_if_serious(error)
            return False  # the screening says so, and goes on without it
        return found.score >= undefended.score

    def _outside(self, at: Situation, report: Screening) -> Outcome:
        """G0 with all that the ensemble tried: the best over its attacks that could be run."""
        ensemble = cast(Ensemble, at.attack.method)
        parts = [methods.attack(spec) for spec in ensemble.candidates]
        costly = [part for part in parts if part.method.access > Access.WEIGHTS]
        if report.stopped or not costly:
            return self.rider.outside(at.under(parts[0]))
        found = []
        for part in costly:
            try:
                found.append(self.rider.outside(at.under(part)))
            except Exception as error:
                stop_if_serious(error)
                report.failed.setdefault(part.spec, described(error))
        if not found:
            return self.rider.outside(at.under(parts[0]))
        return max(found, key=lambda outcome: outcome.score)

    def _screen(self, at: Situation, report: Screening) -> None:
        """Race the merges of all candidates over the validation split (as a search races its own);
        the best of the others join the first.

        A candidate that raises, whatever it raises, is noted and is out; one that makes the merges
        of one before it is not looked at twice.

        Raises:
            MethodError: every candidate failed.
        """
        ensemble, rider = cast(Ensemble, at.attack.method), self.rider
        merge = self.rider.undefended(at).merge
        favourite = merge.setting if merge else None
        unit = rider.units(at)
        entries: dict[str, tuple[str, Candidate]] = {}
        contents: set[str] = set()
        for spec in ensemble.candidates:
            try:
                options = self._entries(at.under(methods.attack(spec)), favourite)
            except Exception as error:
                stop_if_serious(error)
                report.failed[spec] = described(error)
                continue
            fresh = [option for option in options if option.content not in contents]
            contents.update(option.content for option in fresh)
            entries |= {f"{spec} {i}": (spec, option) for i, option in enumerate(fresh)}
        found = race(
            [Racer(name) for name in entries],
            lambda name, task, rows: rider.bits(entries[name][1], task, "validation", rows),
            unit,
            rider.suite.validation_rungs,
            SCREENED,
        )
        seen: dict[str, int] = {}
        for racer in found.ranked:  # the best of each candidate first
            spec, _ = entries[racer.name]
            report.scores.setdefault(spec, round(racer.score(unit), 4))
            seen[spec] = seen.get(spec, 0) + racer.seen * len(unit)
        for name, reason in found.failed.items():
            if entries[name][0] not in report.scores:
                report.failed[entries[name][0]] = reason
        if not seen:
            raise MethodError(f"every attack of {at.attack.spec} failed: {report.failed}")
        first = next(spec for spec in ensemble.candidates if spec in seen)
        others = [spec for spec in seen if spec != first]
        report.finalists = [first, *others[: ensemble.challengers]]
        report.passes = found.passes
        report.shared = sum(seen[spec] for spec in report.finalists)

    def _entries(self, at: Situation, favourite: Setting | None) -> list[Candidate]:
        """The merges of one candidate that screening looks at, refined if the attack refines."""
        bench = self.rider.bench
        base, parts = made.members(bench.recovered(at))
        at = made.merging(bench, at)
        settings = representative(self.rider.settings(at.merger, at.group), favourite)
        options = made.merges(bench, at, base, parts, settings, "merge")
        if at.attack.method.refines:
            # One is enough to compare: what refining repairs does not hang on the setting.
            options = [made.refined(bench, at, options[0])]
        return options

    def _final(self, at: Situation, report: Screening) -> None:
        """Each finalist's whole search; a challenger must beat the first by a standard error."""
        rider = self.rider
        unit = rider.units(at)
        leading: np.ndarray | None = None
        for spec in report.finalists:
            try:
                outcome = rider.solve(at.under(methods.attack(spec)))
                mine = rider.validated(outcome.best, unit, rider.rungs())
            except Exception as error:
                stop_if_serious(error)
                report.failed[spec] = described(error)
                continue
            report.searches[spec] = outcome.search.passes
            gap = 0.0 if leading is None else mine - leading
            error_of_mean = np.std(gap, ddof=1) / len(mine) ** 0.5 if leading is not None else 0.0
            if leading is None or np.mean(gap) > error_of_mean:
                report.winner, leading = spec, mine
        if not report.winner:
            raise MethodError(f"every finalist failed: {report.failed}")


def representative(settings: Sequence[Setting], favourite: Setting | None) -> list[Setting]:
    """At most two settings: ``favourite`` if it is among them, and the victim at its strongest
    with the least of the partners."""
    merges = [s for s in settings if s.coefficients[0] and any(s.coefficients[1:])]
    pinned = min(merges, key=lambda s: (-s.coefficients[0], sum(s.coefficients[1:])))
    chosen = [favourite] if favourite in merges else []
    return [*chosen, *([pinned] if pinned not in chosen else [])]
