"""Packed outcomes, protection, its intervals, and aggregates."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from fabricated import NO_BENEFIT, cell, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.core.errors import UnmergeBenchError
from benchmark.evaluation import statistics
from benchmark.evaluation.scoring import Gains
from benchmark.evaluation.statistics import (
    MODELS,
    aggregate,
    pack_bits,
    ratio_protection,
    resampled_gains,
    unpack_bits,
)

# No deadline: a busy machine is no failure.
few = settings(deadline=None, max_examples=40)
accuracies = st.integers(0, 100).map(lambda percent: percent / 100)


def correct(n: int = 200, seed: int = 0, **models: float) -> dict[str, dict[str, str]]:
    """Outcomes of each model with that accuracy on each of two tasks.

    The release gives away nothing, unless ``reference`` says so.
    """
    rng = np.random.default_rng(seed)
    made = {m: {t: outcomes(a, n, rng) for t in ("one", "two")} for m, a in models.items()}
    return {"reference": made["outside"], **made}


@given(st.lists(st.booleans(), max_size=300))
@few
def test_packing_round_trips(bits: list[bool]) -> None:
    text = pack_bits(bits)
    assert unpack_bits(text).tolist() == bits
    assert unpack_bits(text, len(bits)).tolist() == bits
    assert len(text) == 2 * (len(bits) // 8 + 1)


@pytest.mark.parametrize("text", ["xyz", "0000", "", "abc"])
def test_damaged_outcomes_are_refused(text: str) -> None:
    with pytest.raises(UnmergeBenchError, match="damaged outcomes"):
        unpack_bits(text)


def test_a_wrong_number_of_outcomes_is_refused() -> None:
    with pytest.raises(UnmergeBenchError, match="3 outcomes where 4 were expected"):
        unpack_bits(pack_bits([True, False, False]), 4)


@given(st.integers(0, 999), accuracies)
@few
def test_nothing_is_protected_when_attacked_equals_undefended(seed: int, accuracy: float) -> None:
    outside = accuracy / 2
    found = correct(seed=seed, attacked=accuracy, undefended=accuracy, outside=outside, expert=0.95)
    found["attacked"] = found["undefended"]
    estimate = ratio_protection(found, resamples=200)
    if accuracy < 0.04:  # merging gains under 0.02
        assert math.isnan(estimate.value)
        assert estimate.interval is None
    else:
        assert estimate.value == pytest.approx(0, abs=1e-12)
        if estimate.interval:  # the pairing is exact: no resample moves it
            assert estimate.interval == pytest.approx((0, 0), abs=1e-12)


@given(st.integers(0, 999), st.integers(55, 95))
@few
def test_all_is_protected_when_attacked_equals_outside(seed: int, percent: int) -> None:
    found = correct(seed=seed, attacked=0.3, undefended=percent / 100, outside=0.3, expert=0.95)
    found["attacked"] = found["outside"]
    estimate = ratio_protection(found, resamples=200)
    assert estimate.value == pytest.approx(1, abs=1e-12)
    assert estimate.interval == pytest.approx((1, 1), abs=1e-12)


@given(st.integers(0, 999), st.integers(30, 90))
@few
def test_what_a_release_gives_away_is_not_protected(seed: int, percent: int) -> None:
    """The release used alone gets so much, and no attack gains more."""
    found = correct(
        400, seed, attacked=0.3, undefended=0.9, outside=percent / 100, reference=0.3, expert=1.0
    )
    found["attacked"] = found["outside"]
    estimate = ratio_protection(found, resamples=200)
    most = 1 - (percent / 100 - 0.3) / (0.9 - 0.3)
    if percent >= 89:  # under 0.02 is left to gain
        assert estimate == (0, 0, 0)
    else:
        assert estimate.value == pytest.approx(min(1, most))
        # No resample frees a release of what it gave away: its outcomes may only be worth less.
        assert estimate.high <= min(1, most) + 0.2


@given(st.integers(0, 999), st.integers(40, 90))
@few
def test_the_interval_holds_the_point_estimate(seed: int, attacked: int) -> None:
    found = correct(400, seed, attacked=attacked / 100, undefended=0.9, outside=0.5, expert=0.95)
    value, low, high = ratio_protection(found)
    assert low <= value <= high
    assert value == pytest.approx(1 - (attacked - 50) / 40, abs=0.02)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    """Against the textbook loop: draw examples, score all four models on them, repeat."""
    found = correct(300, attacked=0.7, undefended=0.9, outside=0.5, expert=0.95)
    bits = {m: np.stack([unpack_bits(v) for v in by.values()]) for m, by in found.items()}
    rng = np.random.default_rng(7)
    ratios = []
    for _ in range(4000):
        gains = dict.fromkeys(bits, 0.0)
        for task in range(2):
            rows = rng.integers(0, 300, 300)
            expert = bits["expert"][task][rows].mean()
            for model in bits:
                gains[model] += bits[model][task][rows].mean() / expert / 2
        ratios.append(Gains(*(gains[model] for model in Gains._fields[:4])).protection)
    _, low, high = ratio_protection(found, resamples=4000)
    assert (low, high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.012)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Fresh draws of 200 examples from known accuracies: 95 % of the intervals hold the truth."""
    truth = 1 - (0.7 - 0.5) / (0.9 - 0.5)
    inside, rounds = 0, 200
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        rates = {"attacked": 0.7, "undefended": 0.9, "outside": 0.5, "expert": 0.95}
        found = {m: {t: pack_bits(rng.random(200) < p) for t in "ab"} for m, p in rates.items()}
        found["reference"] = found["outside"]
        _, low, high = ratio_protection(found, resamples=400)
        inside += low <= truth <= high
    assert 0.90 <= inside / rounds <= 0.99


def test_no_denominator_no_ratio() -> None:
    equal = correct(attacked=0.5, undefended=0.4, outside=0.6, expert=0.9)
    value, low, high = ratio_protection(equal)
    assert math.isnan(value)
    assert math.isnan(low)
    assert math.isnan(high)
    # Hardly any benefit: a value, but many resamples have none, so no honest interval.
    barely = correct(attacked=0.5, undefended=0.63, outside=0.6, expert=0.9)
    estimate = ratio_protection(barely)
    assert not math.isnan(estimate.value)
    assert estimate.interval is None


def test_an_expert_without_a_right_answer_gives_nan() -> None:
    found = correct(attacked=0.5, undefended=0.8, outside=0.6, expert=0.0)
    assert math.isnan(ratio_protection(found).value)


def test_incomplete_outcomes_are_refused() -> None:
    found = correct(attacked=0.5, undefended=0.8, outside=0.6, expert=0.9)
    for model in MODELS:
        with pytest.raises(UnmergeBenchError, match=f"no per-example outcomes of {model}"):
            ratio_protection({m: v for m, v in found.items() if m != model})
    with pytest.raises(UnmergeBenchError, match="task 'two' are incomplete"):
        ratio_protection({**found, "outside": {"one": found["outside"]["one"]}})
    with pytest.raises(UnmergeBenchError, match="differ in number"):
        ratio_protection({**found, "expert": {t: pack_bits([True]) for t in ("one", "two")}})


def test_cells_on_one_task_see_one_resample() -> None:
    """Equal outcomes in two cells stay equal in every resample, and other tasks draw anew."""
    first = correct(attacked=0.5, undefended=0.8, outside=0.6, expert=0.9)
    renamed = {m: {"one": v["one"], "other": v["one"]} for m, v in first.items()}
    only = {m: {"one": v["one"]} for m, v in first.items()}
    again = {m: {"other": v["one"]} for m, v in first.items()}
    _, a = resampled_gains(only, scope="bed")
    _, b = resampled_gains(again, scope="bed")
    _, both = resampled_gains(renamed, scope="bed")
    _, elsewhere = resampled_gains(only, scope="garden")
    assert not np.allclose(a, b)
    assert not np.allclose(a, elsewhere)
    np.testing.assert_allclose(both, (a + b) / 2)


@given(st.floats(-0.2, 1.2), st.integers(0, 50))
@few
def test_a_ratio_of_sums_over_one_cell_is_its_ratio(value: float, seed: int) -> None:
    one = cell("params", "aga", protection=value, seed=seed)
    found = aggregate([one])
    assert found.estimate.value == pytest.approx(one.protection)
    assert found.estimate.interval == pytest.approx(one.protection_ci)
    assert found.by_seed == {seed: pytest.approx(one.protection)}
    assert ratio_protection(one.correct).value == pytest.approx(one.protection)


def test_sums_weigh_cells_by_what_there_was_to_protect() -> None:
    large = cell("params", "aga", protection=1.0)
    small = cell("params", "aga", protection=0.0, seed=1)
    small.gain = small.gain_undefended = (small.gain_reference or 0) + 0.05
    total = (large.gain_undefended or 0) - (large.gain_outside or 0)
    found = aggregate([large, small])
    assert found.estimate.value == pytest.approx(1 - 0.05 / (total + 0.05), abs=0.01)
    assert found.seed_mean == pytest.approx(0.5, abs=0.01)
    assert found.seed_spread == pytest.approx(1.0, abs=0.01)


def test_an_interval_narrows_with_independent_cells_only() -> None:
    """The same examples again teach nothing; those of another victim do."""
    one = cell("params", "aga", protection=0.5)
    twice = aggregate([one, one.model_copy(update={"seed": 1})]).estimate
    single = aggregate([one]).estimate
    assert twice == pytest.approx(single)
    swap = {"r8": "rt", "bbc": "20ng"}
    other = one.model_copy(
        update={"correct": {m: {swap[t]: one.correct[m][t] for t in swap} for m in MODELS}}
    )
    more = aggregate([one, other]).estimate
    assert more.high - more.low < 0.85 * (single.high - single.low)


def test_what_has_no_value_is_left_out() -> None:
    good = cell("params", "aga", protection=0.5)
    broken = cell("params", "aga", protection=1.0, seed=1, status="error", reason="failed")
    void = cell("params", "aga", protection=1.0, seed=2, **NO_BENEFIT)
    found = aggregate([good, broken, void])
    assert found.estimate == aggregate([good]).estimate
    assert (found.cells, found.no_benefit) == (1, 1)
    assert math.isnan(aggregate([broken, void]).estimate.value)
    assert math.isnan(aggregate([]).seed_mean)


def test_without_outcomes_there_is_a_value_but_no_interval() -> None:
    bare = cell("params", "aga", protection=0.5, correct={})
    found = aggregate([bare]).estimate
    assert found.value == pytest.approx(bare.protection)
    assert found.interval is None


def test_groups_of_no_gain_are_no_matter() -> None:
    """The base, and the release as shipped on the victim's task alone, are not resampled."""
    one = cell("params", "aga", protection=0.5)
    assert {"base", "released"} <= one.correct.keys()
    bare = {model: one.correct[model] for model in MODELS}
    assert ratio_protection(one.correct) == ratio_protection(bare)


def test_an_interval_is_fast() -> None:
    """A cell of two tasks with 500 examples each, nothing drawn before: under 50 ms of work."""
    found = correct(500, attacked=0.5, undefended=0.8, outside=0.6, expert=0.9)
    spent = []
    for _ in range(5):
        statistics._accuracy.cache_clear()
        statistics._draws.cache_clear()
        start = time.process_time()
        ratio_protection(found)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.05
