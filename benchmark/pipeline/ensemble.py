"""The search of an ensemble: which of its attacks does best on validation, cheaply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from benchmark.api import methods
from benchmark.api.contracts import Attack, Defense, Ensemble, Merger, Setting
from benchmark.api.methods import Named
from benchmark.core.errors import MethodError, UnmergeBenchError, first_line
from benchmark.evaluation.scoring import accuracies
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import Candidate, Skip
from benchmark.pipeline.suite import Group

if TYPE_CHECKING:
    from benchmark.pipeline.freerider import FreeRider


@dataclass
class Screening:
    """What an ensemble did: finalists, winner, scores, failures, forward passes.

    ``stopped``: its first candidate alone did, and the others were not looked at. ``scores``:
    validation score by candidate over the first rung. ``shared``: passes of the finalists in the
    screening, which their whole searches do not repeat. ``searches``: passes of each finalist's
    search.
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


def screen(
    rider: FreeRider,
    defense: Named[Defense],
    attack: Named[Attack],
    merger: Named[Merger],
    group: Group,
    seed: int,
    favourite: Setting | None,
) -> Screening:
    """The finalists of the ensemble ``attack``: its first candidate, and the best of the others.

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
            report.failed[spec] = first_line(error)
    if not entries:
        raise MethodError(f"every attack of {attack.spec} failed: {report.failed}")
    rows = range(rider.suite.validation_rungs[0])
    expert = accuracies(rider.experts(group, "validation"))
    for spec, options in entries.items():
        scores = [float(rider.validated(o, expert, [rows]).mean()) for o in options]
        report.scores[spec] = round(max(scores), 4)
        report.passes += len(options) * len(rows) * len(expert)
    first, *others = entries
    others.sort(key=lambda spec: -report.scores[spec])
    report.finalists = [first, *others[: ensemble.challengers]]
    each = len(rows) * len(expert)
    report.shared = sum(len(entries[spec]) * each for spec in report.finalists)
    return report


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
