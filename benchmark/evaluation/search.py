"""The free-rider's search: which candidate model is best on the validation split.

Racing with successive halving (Maron & Moore 1994; Jamieson & Talwalkar 2016): every candidate sees
the first few examples; one is dropped when it trails the leader by more than z standard errors of
their *paired* difference, and at most half go on to the next rung: of any field from ``HALVING``
examples on, of a field of more than ``FIELD`` before. One rung is the exhaustive search.

**Error bound.** z = Φ⁻¹(1 − δ/(K·R)) for K candidates and R rungs at which one may be dropped: with
probability at least 1 − δ (normal approximation, union bound) no candidate that is truly as good as
the leader is dropped for trailing. Halving keeps the cost down where examples hardly tell
candidates apart; what it may have lost is stated as ``bound``: with the same probability none of
the dropped is truly better than the leader of its rung, to whom the winner did not lose, by more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from benchmark.core.errors import described, stop_if_serious

#: (candidate name, task, rows) → which validation examples are right, (len(rows),) bool.
Correct = Callable[[str, str, range], np.ndarray]

#: δ: how likely the search may be wrong.
ERROR = 0.02
HALVING = 32
FIELD = 16


@dataclass
class Racer:
    """One candidate. ``safe`` ones (known already, so free) are never dropped."""

    name: str
    safe: bool = False
    correct: dict[str, np.ndarray] = field(default_factory=dict)

    def extend(self, task: str, outcomes: np.ndarray) -> None:
        """Add outcomes on the next examples of ``task``."""
        self.correct[task] = np.concatenate([self.correct.get(task, outcomes[:0]), outcomes])

    @property
    def seen(self) -> int:
        """Validation examples per task it was tried on."""
        return len(next(iter(self.correct.values()), ()))

    def outcomes(self, expert: Mapping[str, float]) -> np.ndarray:
        """Normalised outcome per example, averaged over tasks: (n,). Its mean is the score."""
        return np.mean([self.correct[task] / accuracy for task, accuracy in expert.items()], axis=0)

    def score(self, expert: Mapping[str, float]) -> float:
        """Mean normalised outcome."""
        return float(self.outcomes(expert).mean())


@dataclass
class Result:
    """What a race found.

    ``ranked``: every candidate that did not fail, those that saw the whole validation split first,
    best first; of equals the first. ``failed``: name → why it cannot be run. ``passes``: forward
    passes, ``exhaustive``: what they would be without dropping anybody (``safe`` ones never count).
    ``bound``: see the module, in units of the score.
    """

    ranked: list[Racer]
    failed: dict[str, str]
    passes: int
    exhaustive: int
    bound: float


def race(
    candidates: Sequence[Racer],
    correct: Correct,
    expert: Mapping[str, float],
    rungs: Sequence[int],
    share: float = 0.5,
) -> Result:
    """Search ``candidates``.

    ``expert``: task → the expert's validation accuracy, by which outcomes are normalised.
    ``rungs``: increasing numbers of examples per task; the last is the whole split. Of equals on a
    rung the candidate goes on that comes first in ``candidates``, which go from weak to strong; in
    a field of more than ``FIELD`` the one that comes last: near the base all are alike on a few
    examples, and their order would keep the weak. Whatever a candidate raises is its own failure.
    ``share``: at most so many of a field go on.
    """
    alive, seen, bound = list(candidates), 0, 0.0
    failed: dict[str, str] = {}
    comparisons = max(1, len(candidates) * (len(rungs) - 1))
    place = {id(racer): number for number, racer in enumerate(candidates)}
    sigmas = NormalDist().inv_cdf(1 - ERROR / comparisons)
    for position, rung in enumerate(rungs):
        for racer in alive:
            try:
                for task in expert:
                    racer.extend(task, correct(racer.name, task, range(seen, rung)))
            except Exception as error:
                stop_if_serious(error)
                failed[racer.name] = described(error)
        alive = [racer for racer in alive if racer.name not in failed]
        if not alive:
            break
        seen = rung
        if sum(not racer.safe for racer in alive) > FIELD:
            alive.sort(key=lambda racer: -place[id(racer)])
        alive.sort(key=lambda racer: -racer.score(expert))
        if position < len(rungs) - 1:
            alive, lost = _survivors(alive, expert, sigmas, share)
            bound = max(bound, lost)
    ran = [racer for racer in candidates if racer.name not in failed]
    ranked = sorted(ran, key=lambda racer: (-racer.seen, -racer.score(expert)))
    searched = [racer for racer in candidates if not racer.safe]
    passes = sum(racer.seen for racer in searched) * len(expert)
    return Result(ranked, failed, passes, len(searched) * rungs[-1] * len(expert), bound)


def _survivors(
    ranked: list[Racer], expert: Mapping[str, float], sigmas: float, share: float
) -> tuple[list[Racer], float]:
    """Those that go on, and by how much one that halving drops may be better than the leader."""
    leader = ranked[0].outcomes(expert)
    contenders: list[tuple[Racer, float]] = []
    for racer in ranked:
        gap = leader - racer.outcomes(expert)
        # A spread of zero after a few equal outcomes is no certainty: one example's worth of slack.
        slack = max(sigmas * gap.std(ddof=1) / len(gap) ** 0.5, 1 / len(gap))
        if not racer.safe and gap.mean() <= slack:
            contenders.append((racer, float(slack - gap.mean())))
    most = math.ceil(share * sum(not racer.safe for racer in ranked))
    kept = max(most, 2 if len(leader) >= HALVING else round(2 * share * FIELD))
    lost = max((worth for _, worth in contenders[kept:]), default=0.0)
    contenders = contenders[:kept]
    going = {id(racer) for racer, _ in contenders}
    return [racer for racer in ranked if racer.safe or id(racer) in going], lost
