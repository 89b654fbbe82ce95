"""Intervals of protection, from per-example outcomes.

The bootstrap is paired: one resample of a task's test examples serves the attacked, the undefended,
the outside and the reference model and the expert they are all normalised by, so that what they
share cancels. What a resample counts for is decided once, by the cell's own gains
(:class:`benchmark.evaluation.scoring.Gains`): a release that leaves nothing to merge protects
nothing in any resample.
Where several cells are put together, cells that test on the same task see the same resample. That
is right when they hold the same examples (their errors are correlated) and harmless when they do
not (the covariance of independent examples under shared weights has mean 0).

The outcomes are those of the models that validation picked, so the intervals hold for the test
split, not for the choice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark.core.errors import UnmergeBenchError
from benchmark.core.records import Cell
from benchmark.evaluation.scoring import SITUATIONS, Gains, ratio

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
#: Groups of ``Cell.correct`` that are resampled; the others are of one task or of no gain.
MODELS = (*SITUATIONS, "expert")

Correct = Mapping[str, Mapping[str, str]]
Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A point estimate and its 95 % interval; NaN where undefined."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None where there is none."""
        return None if math.isnan(self.low) else (self.low, self.high)


class Aggregate(NamedTuple):
    """Several cells put together; ``cells`` of them entered, ``no_benefit`` were left out."""

    estimate: Estimate
    by_seed: dict[int, float]
    cells: int
    no_benefit: int

    @property
    def seed_mean(self) -> float:
        """Mean over seeds of the ratio of sums within a seed; NaN where there is none."""
        values = [value for value in self.by_seed.values() if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    @property
    def seed_spread(self) -> float:
        """Largest difference between two seeds; 0 with fewer than two."""
        values = [value for value in self.by_seed.values() if not math.isnan(value)]
        return max(values) - min(values) if values else 0.0


def pack_bits(outcomes: Sequence[bool] | NDArray[np.bool_]) -> str:
    """Per-example outcomes (n,) → hex, with a closing 1 bit so that the text knows its own n."""
    bits = np.append(np.asarray(outcomes, dtype=bool).ravel(), True)
    return np.packbits(bits).tobytes().hex()


def unpack_bits(text: str, n: int | None = None) -> NDArray[np.bool_]:
    """The inverse of ``pack_bits``: outcomes (n,).

    Raises:
        UnmergeBenchError: not such a text, or not of ``n`` outcomes where ``n`` is given.
    """
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8)).astype(bool)
    except ValueError:
        raise UnmergeBenchError(f"damaged outcomes {text[:16]!r}...: not hexadecimal") from None
    ends = np.flatnonzero(bits)
    if not ends.size:
        raise UnmergeBenchError(f"damaged outcomes {text[:16]!r}...: no closing bit")
    found = int(ends[-1])
    if n is not None and n != found:
        raise UnmergeBenchError(f"{found} outcomes where {n} were expected; the cell is damaged")
    return bits[:found]


@lru_cache(maxsize=32)
def _draws(name: str, n: int, resamples: int, seed: int) -> NDArray[np.int16]:
    """(n, resamples): how often each example is drawn. A function of its arguments alone."""
    rng = np.random.default_rng([seed, n, zlib.crc32(name.encode())])
    drawn = rng.integers(0, n, size=(resamples, n))
    drawn += np.arange(resamples)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    return np.ascontiguousarray(counts.T, dtype=np.int16)


@lru_cache(maxsize=4096)
def _accuracy(text: str, name: str, resamples: int, seed: int) -> tuple[int, float, Floats]:
    """(n, accuracy, its resamples (resamples,)) of packed outcomes. Cells share most of theirs."""
    right = unpack_bits(text)
    n = len(right)
    if not n:
        return 0, math.nan, np.full(resamples, np.nan)
    draws = _draws(name, n, resamples, seed)
    rare = right if right.mean() <= 0.5 else ~right  # a whole resample sums to n: add up the less
    counted = draws[rare].sum(axis=0, dtype=np.int64)
    resampled = (counted if rare is right else n - counted) / n
    resampled.flags.writeable = False  # shared through the cache
    return n, float(right.mean()), resampled


def resampled_gains(
    correct: Correct,
    *,
    scope: str = "",
    secrets: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[Floats, Floats]:
    """G of attacked, undefended, outside, reference: the point (4,), its resamples (resamples, 4).

    G is the mean over tasks of accuracy / the expert's accuracy; of ``secrets``, the share that
    leaks. ``scope`` (the testbed's name) keeps equally named tasks of two testbeds apart. NaN where
    an expert has no correct answer.

    Raises:
        UnmergeBenchError: a model or a task is missing, or outcomes differ in number.
    """
    missing = [model for model in MODELS if not correct.get(model)]
    if missing:
        raise UnmergeBenchError(f"no per-example outcomes of {', '.join(missing)}; run it again")
    tasks = sorted(correct["attacked"])
    point, drawn = np.zeros(len(SITUATIONS)), np.zeros((resamples, len(SITUATIONS)))
    for task in tasks:
        try:
            found = [
                _accuracy(correct[model][task], f"{scope}/{task}", resamples, seed)
                for model in MODELS
            ]
        except KeyError:
            raise UnmergeBenchError(f"outcomes on task {task!r} are incomplete") from None
        sizes = {n for n, _, _ in found}
        if len(sizes) > 1 or 0 in sizes:
            raise UnmergeBenchError(f"outcomes on task {task!r} differ in number or are none")
        *models, (_, expert, experts) = found
        if secrets:
            expert, experts = 1.0, np.ones(resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(experts > 0, 1 / experts, np.nan)
            for column, (_, overall, resampled) in enumerate(models):
                point[column] += overall / expert if expert else math.nan
                drawn[:, column] += resampled * scale
    return point / len(tasks), drawn / len(tasks)


def _estimate(value: float, left: Floats, benefit: Floats) -> Estimate:
    """Percentile interval of 1 − left/benefit, resample by resample.

    A resample without a benefit has no ratio. Where they are more than 1 − LEVEL of all, there is
    no honest interval, and it is NaN; else they are dropped.
    """
    defined = benefit > 0
    if math.isnan(value) or defined.mean() < LEVEL:
        return Estimate(value)
    ratios = 1 - left[defined] / benefit[defined]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def ratio_protection(
    correct: Correct,
    *,
    alone: bool = True,
    scope: str = "",
    secrets: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Protection of one cell from ``Cell.correct``, with its 95 % paired bootstrap interval.

    ``alone``: the outside option is the release. Deterministic. NaN where merging the undefended
    expert has no benefit; the interval alone is NaN where more than 5 % of the resamples have none.
    """
    point, drawn = resampled_gains(
        correct, scope=scope, secrets=secrets, resamples=resamples, seed=seed
    )
    gains = Gains.made(map(float, point), alone=alone)
    value = gains.protection
    return _estimate(math.nan if value is None else value, *gains.terms(drawn))


def aggregate(cells: Iterable[Cell], *, resamples: int = RESAMPLES, seed: int = SEED) -> Aggregate:
    """Protection over victims and seeds as a ratio of sums of ``Gains.terms``.

    Which cells enter follows from their gains, whatever their status says of them: without a
    benefit there was nothing to protect, and cells with an error or skipped have no value. NaN
    where none is left. The interval needs ``correct`` in every cell, and is NaN otherwise.
    """
    found = [(cell, gains) for cell in cells if (gains := Gains.of(cell)) is not None]
    entered = [(cell, gains) for cell, gains in found if gains.status == "ok"]
    value, by_seed = _ratio_of_sums([gains for _, gains in entered]), {}
    for one in sorted({cell.seed for cell, _ in entered}):
        by_seed[one] = _ratio_of_sums([gains for cell, gains in entered if cell.seed == one])
    counts = len(entered), len(found) - len(entered)
    if not entered or not all(cell.correct for cell, _ in entered):
        return Aggregate(Estimate(value), by_seed, *counts)
    left, benefit = np.zeros(resamples), np.zeros(resamples)
    for cell, gains in entered:
        _, drawn = resampled_gains(
            cell.correct,
            scope=cell.testbed,
            secrets=bool(cell.duties),
            resamples=resamples,
            seed=seed,
        )
        more = gains.terms(drawn)
        left += more[0]
        benefit += more[1]
    return Aggregate(_estimate(value, left, benefit), by_seed, *counts)


def _ratio_of_sums(several: Sequence[Gains]) -> float:
    terms = [gains.terms() for gains in several]
    return ratio(float(sum(left for left, _ in terms)), float(sum(most for _, most in terms)))
