"""The free-rider's search: which candidate model is best on the validation split.

Racing with successive halving (Maron & Moore 1994; Jamieson & Talwalkar 2016): every candidate sees
the first few examples; one is dropped when it trails the leader by more than three standard errors
of their *paired* difference. From ``HALVING`` examples on, at most half (but two) go on to the next
rung. A candidate as good as the best is wrongly dropped by the first rule with probability below
0.14 % per comparison (normal approximation); the second bounds the cost, and chooses between
candidates that so many examples hardly tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

#: (candidate name, task, rows) → which validation examples are right, (len(rows),) bool.
Correct = Callable[[str, str, range], np.ndarray]

SIGMAS = 3.0
HALVING = 32


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


def race(
    candidates: Sequence[Racer],
    correct: Correct,
    expert: Mapping[str, float],
    rungs: Sequence[int],
) -> tuple[list[Racer], int]:
    """Candidates that saw the whole validation split, best first; and how many forward passes.

    ``expert``: task → the expert's validation accuracy, by which outcomes are normalised.
    ``rungs``: increasing numbers of examples per task; the last is the whole split. Ties go to the
    candidate that comes first in ``candidates``.
    """
    alive, seen, passes = list(candidates), 0, 0
    for position, rung in enumerate(rungs):
        for racer in alive:
            for task in expert:
                fresh = correct(racer.name, task, range(seen, rung))
                passes += len(fresh)
                racer.extend(task, fresh)
        seen = rung
        alive.sort(key=lambda racer: -float(racer.outcomes(expert).mean()))
        if position < len(rungs) - 1:
            alive = _survivors(alive, expert)
    return alive, passes


def _survivors(ranked: list[Racer], expert: Mapping[str, float]) -> list[Racer]:
    leader = ranked[0].outcomes(expert)
    contenders = []
    for racer in ranked:
        gap = leader - racer.outcomes(expert)
        error = gap.std(ddof=1) / len(gap) ** 0.5
        # A spread of zero after a few equal outcomes is no certainty: one example's worth of slack.
        slack = max(SIGMAS * error, 1 / len(gap))
        if not racer.safe and gap.mean() <= slack:
            contenders.append(racer)
    if len(leader) >= HALVING:
        contenders = contenders[: max(2, (sum(not racer.safe for racer in ranked) + 1) // 2)]
    return [racer for racer in ranked if racer.safe or racer in contenders]
