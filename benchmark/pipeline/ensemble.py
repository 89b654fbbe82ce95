"""The search of an ensemble: which of its attacks does best on validation, cheaply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from benchmark import methods
from benchmark.contracts import Attack, Defense, Ensemble, Merger, Setting
from benchmark.errors import MethodError, UnmergeBenchError
from benchmark.evaluation.scoring import accuracies
from benchmark.evaluation.search import Racer
from benchmark.methods import Named
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate, Skip
from benchmark.pipeline.suite import Group

if TYPE_CHECKING:
    from benchmark.pipeline.freerider import FreeRider


@dataclass
class Screening:
    """What an ensemble did: its winner, validation score by candidate, failures, forward passes.

    ``scores`` are over the first rung; of those that went on, over the second. ``shared``: the
    winner's forward passes, which its whole search does not repeat.
    """

    version: str
    winner: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    shared: int = 0

    def to_dict(self) -> dict[str, object]:
        return {
            "version": self.version,
            "winner": self.winner,
            "scores": self.scores,
            "failed": self.failed,
            "screening_passes": self.passes,
            "shared_passes": self.shared,
        }


def screen(
    rider: FreeRider,
    defense: Named[Defense],
    attack: Named[Attack],
    merger: Named[Merger],
    group: Group,
    seed: int,
    favourite: Setting | None,
) -> tuple[Named[Attack], Screening]:
    """The attack of the ensemble ``attack`` that screening picks.

    ``favourite``: the setting that is best for the undefended expert. A candidate that raises is
    noted in ``failed`` and is out.

    Raises:
        MethodError: every candidate failed.
    """
    ensemble = cast(Ensemble, attack.method)
    report = Screening(ensemble.version)
    entries: dict[str, list[Candidate]] = {}
    for spec in ensemble.candidates:
        try:
            entries[spec] = _entries(rider, defense, spec, merger, group, seed, favourite)
        except (UnmergeBenchError, Skip) as error:
            report.failed[spec] = str(error).splitlines()[0]
    if not entries:
        raise MethodError(f"every attack of {attack.spec} failed: {report.failed}")
    rungs = rider.suite.validation_rungs
    expert = accuracies(rider.experts(group, "validation"))
    racers = {
        spec: [Racer(f"{spec}/{i}") for i in range(len(options))]
        for spec, options in entries.items()
    }
    alive, seen = list(entries), 0
    for rung in rungs[:2]:
        for spec in alive:
            for option, racer in zip(entries[spec], racers[spec], strict=True):
                for task in expert:
                    rows = range(seen, rung)
                    fresh = rider.bench.bits(option.content, option.build, task, "validation", rows)
                    report.passes += len(rows)
                    racer.extend(task, fresh)
            best = max(float(r.outcomes(expert).mean()) for r in racers[spec])
            report.scores[spec] = round(best, 4)
        alive = sorted(alive, key=lambda spec: -report.scores[spec])[: ensemble.kept]
        seen = rung
    report.winner = alive[0]
    report.shared = sum(racer.seen * len(expert) for racer in racers[report.winner])
    return methods.attack(report.winner), report


def _entries(
    rider: FreeRider,
    defense: Named[Defense],
    spec: str,
    merger: Named[Merger],
    group: Group,
    seed: int,
    favourite: Setting | None,
) -> list[Candidate]:
    """The merges of one candidate that screening looks at, refined if the attack refines."""
    attack = methods.attack(spec)
    wrapped = Named(merger.spec, attack.method.merging(merger.method, rider.bench.anatomy))
    settings = representative(rider.settings(wrapped, group), favourite)
    base, parts = made.members(rider.bench.recovered(defense, attack, group, seed))
    options = made.merges(rider.bench, wrapped, base, parts, settings, group, seed, "merge")
    if attack.method.refines:
        # One is enough to compare: what refining repairs does not hang on the setting.
        options = [made.refined(rider.bench, options[0], attack, group, seed)]
    for option in options:
        option.build()  # a failure shows here, where it is noted
    return options


def representative(settings: Sequence[Setting], favourite: Setting | None) -> list[Setting]:
    """At most two settings: ``favourite`` if it is among them, and the victim at its strongest
    with the least of the partners."""
    merges = [s for s in settings if s.coefficients[0] and any(s.coefficients[1:])]
    pinned = min(merges, key=lambda s: (-s.coefficients[0], sum(s.coefficients[1:])))
    chosen = [favourite] if favourite in merges else []
    return [*chosen, *([pinned] if pinned not in chosen else [])]
