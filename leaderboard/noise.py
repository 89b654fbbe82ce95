"""How far two honest machines may be apart, in outcomes per test example.

Another processor rounds differently, and an example on the edge between two classes falls to the
other side. How often was measured, never read off an entry: between machines, 10 of 57,600 outcomes
of a `smoke` entry; with base, experts and defenses trained again by other kernels (no vector
instructions, no MKL dispatch), 58 of the 345,600 of six defenses. No vector of 300 outcomes
differed in more than one, and no choice of the free-rider's changed. The 58 were seven examples
that stand in many cells, so outcomes are told apart by example, not by cell. Three bounds follow:

- a vector of n outcomes may differ in 2 % of them (``SHARE``), at least ``FEW``;
- outcomes of one kind, put together, may lean to one side by 0.5 % of them (``LEAN``), at least
  ``FEW``: whoever flips 2 % of every vector the same way is far beyond;
- over many examples they may lean only as far as a fair coin would, but once in 100,000 times
  (``ALARM``): an edge has two sides, and another machine does not know which of them pays.

For an entry's own noise none of them asks: whoever flips outcomes in both directions makes that as
wide as they like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache
from math import ceil, comb, inf

import numpy as np

from benchmark.evaluation.scoring import Gains
from benchmark.evaluation.statistics import unpack_bits

#: Of a vector of outcomes.
SHARE = Fraction(2, 100)
#: Of the outcomes of one kind: those right here and wrong there, less the reverse.
LEAN = Fraction(5, 1000)
#: However short a vector is: what one edge case in every model of a cell can do.
FEW = 3
#: How often the coin may say so of an honest pair.
ALARM = 1e-5


@cache
def flips(n: int) -> int:
    """In how many of ``n`` outcomes two machines may differ."""
    return max(FEW, ceil(SHARE * n))


@cache
def lean(n: int) -> int:
    """By how many of ``n`` outcomes the one may be better than the other."""
    return max(FEW, ceil(LEAN * n))


@lru_cache(maxsize=4096)
def difference(stated: str, found: str) -> np.ndarray:
    """Packed outcomes → per example +1 where only ``stated`` is right, −1 where only ``found``.

    Empty where they differ in number.
    """
    one, other = unpack_bits(stated), unpack_bits(found)
    if len(one) != len(other):
        return np.zeros(0, dtype=np.int8)
    return one.astype(np.int8) - other.astype(np.int8)


class Leaning:
    """Outcomes of one kind put together: to which side do their differences lean?

    A pair of vectors that stands in many cells counts once.
    """

    def __init__(self) -> None:
        self.bits = 0
        self.net = 0
        self._seen: set[tuple[str, str, str, int]] = set()
        self._by_example: Counter[tuple[str, int]] = Counter()

    def add(self, task: str, stated: str, found: str, sign: int = 1) -> None:
        """A vector on ``task``. ``sign`` −1: being right here counts against the entry."""
        if (key := (task, stated, found, sign)) in self._seen:
            return
        self._seen.add(key)
        gap = sign * difference(stated, found)
        self.bits += len(gap)
        if stated == found:
            return
        self.net += int(gap.sum())
        for example in np.flatnonzero(gap):
            self._by_example[task, int(example)] += int(gap[example])

    @property
    def chance(self) -> float:
        """How likely a fair coin leans as far over the examples that differ (two-sided)."""
        up = sum(net > 0 for net in self._by_example.values())
        down = sum(net < 0 for net in self._by_example.values())
        n = up + down
        tail = sum(comb(n, k) for k in range(max(up, down), n + 1))
        return min(1.0, 2 * tail / 2**n)

    @property
    def problem(self) -> str:
        """Why no honest machine leans like this; empty if one may."""
        if abs(self.net) > lean(self.bits):
            return f"lean by {self.net:+d} of {self.bits} to one side, {lean(self.bits)} may"
        if self.chance < ALARM:
            return f"lean by {self.net:+d} of {self.bits}, almost all to one side"
        return ""


def protection(gains: Gains, experts: Sequence[float], n: int) -> float:
    """How far protection may be apart where no gain leans further than ``lean``; inf if anywhere.

    Of a cell with these gains, accuracies of the tasks' own ``experts``, and ``n`` outcomes a task.
    With protection 1 − L/B, L = G(attacked) − G0 and B = G(undefended) − G0 move by two gains each.
    """
    bits = n * len(experts)
    most = 2 * lean(bits) / bits / min(experts)
    left, benefit = (float(term) for term in gains.terms())
    if benefit <= most:
        return inf
    return most * (1 + abs(left / benefit)) / (benefit - most)
