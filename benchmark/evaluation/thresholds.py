"""Every number at which a verdict turns, and the rules that turn on them. Nowhere else.

Shares of examples are compared as counts: 3 of 200 examples are 1.5 points, whatever a difference
of two floating-point accuracies makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

#: What merging the undefended expert must gain over the outside option, in units of G.
NO_BENEFIT = 0.02
#: A release that adds more than this to the outside option is said to raise it.
RAISED = 0.02
#: A rank needs cells that hold at least this share of the suite's benefit.
COVERED = 0.5
#: Share of test examples that a defense may cost its owner: 1.5 points.
UTILITY_GATE = Fraction(15, 1000)
#: A release may do so much worse on what attackers get than on the test split: 5 points.
TWO_FACED = Fraction(5, 100)
#: Max relative |Δlogit| that float32 leaves of an exact transform (METHODS section 1).
EXACT = 1e-4
#: Growth of a weight's norm over the expert's that earns norm-blow-up.
MOST_GROWTH = 10.0
#: Rounding to bfloat16 may move a release so many times as far as the expert.
HALF_PRECISION = 2.0
#: From here on a defense is said to hold; below BROKEN it counts as broken.
HOLDS = 0.9
BROKEN = 0.5
#: So much less protection left by less access earns weak-attack-beats-strong.
WEAK_BEATS_STRONG = 0.05
#: Spread of protection between seeds that earns seed-dependent.
SEEDS_DIFFER = 0.2

# G is a mean of ratios of counts: two that are equal differ by rounding at most.
_ROUNDING = 1e-9

#: Examples right of the reference and of the model, and how many there are: (expert, model, n).
Counts = tuple[int, int, int]


def has_benefit(undefended: float, outside: float) -> bool:
    """Whether G(undefended) − G0 is enough for there to be something to protect."""
    return undefended - outside >= NO_BENEFIT - _ROUNDING


def raises_outside(outside: float, reference: float) -> bool:
    """Whether a release used alone gives away more than the undefended expert does.

    ``outside``: G0 with the release; ``reference``: G0 with the undefended expert.
    """
    return outside - reference > RAISED + _ROUNDING


def lost(counts: Iterable[Counts]) -> Fraction:
    """Mean share of examples lost against the expert: over victims, each counting once."""
    shares = [Fraction(expert - model, n) for expert, model, n in counts]
    return sum(shares, Fraction()) / len(shares) if shares else Fraction()


def within_gate(counts: Iterable[Counts]) -> bool:
    """The utility gate: at most 1.5 points lost, exactly 1.5 included, on the mean."""
    return lost(counts) <= UTILITY_GATE


def two_faced(seen: float, test: float) -> bool:
    """Whether a release does much worse on what attackers get (``seen``) than on the test split."""
    return test - seen > float(TWO_FACED) + _ROUNDING
