"""Protection as the share of merging's benefit that a defense takes away."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.core.errors import MethodError
from benchmark.evaluation.scoring import Gains, gain, ratio, units
from benchmark.evaluation.thresholds import NO_BENEFIT

gains = st.floats(0, 1.2)


def honest(attacked: float, undefended: float, outside: float) -> Gains:
    """Of a release that gives nothing away."""
    return Gains(attacked, undefended, outside, outside)


@given(gains, gains)
def test_protection_is_zero_where_all_is_restored(undefended: float, outside: float) -> None:
    found = honest(undefended, undefended, outside)
    if found.status == "no-benefit":
        assert undefended - outside < NO_BENEFIT
        assert found.protection is None
    else:
        assert found.protection == pytest.approx(0)


@given(gains, gains)
def test_protection_is_one_where_merging_gains_nothing(undefended: float, outside: float) -> None:
    assert honest(outside, undefended, outside).protection in (None, 1)


@given(gains, gains, gains, gains, gains)
def test_protection_falls_as_the_attacker_gains(
    a: float, b: float, top: float, out: float, reference: float
) -> None:
    low, high = sorted((a, b))
    first = Gains(low, top, out, reference).protection
    second = Gains(high, top, out, reference).protection
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first >= second


@given(gains, gains, gains, gains)
def test_which_cells_count_is_the_same_for_every_release(
    attacked: float, undefended: float, outside: float, reference: float
) -> None:
    found = Gains(attacked, undefended, outside, reference)
    assert found.status == honest(reference, undefended, reference).status
    assert found.benefit == honest(reference, undefended, reference).benefit


def test_protection_is_not_clipped() -> None:
    assert honest(0.4, 1.0, 0.5).protection == pytest.approx(1.2)
    assert honest(1.1, 1.0, 0.5).protection == pytest.approx(-0.2)


def test_what_a_release_gives_away_is_not_protected() -> None:
    kept = Gains(attacked=0.6, undefended=1.0, outside=0.6, reference=0.6)
    within = Gains(attacked=0.62, undefended=1.0, outside=0.62, reference=0.6)
    given_away = Gains(attacked=0.8, undefended=1.0, outside=0.8, reference=0.6)
    emptied = Gains(attacked=0.99, undefended=1.0, outside=0.99, reference=0.6)
    assert [g.raised for g in (kept, within, given_away, emptied)] == [False, False, True, True]
    assert [g.emptied for g in (kept, within, given_away, emptied)] == [False, False, False, True]
    assert kept.protection == 1
    assert within.protection == pytest.approx(1 - 0.02 / 0.4)
    assert given_away.protection == pytest.approx(0.5)
    assert emptied.protection == 0
    assert all(g.benefit == pytest.approx(0.4) for g in (kept, within, given_away, emptied))


def test_an_outside_option_that_no_release_has_a_part_in_counts_in_full() -> None:
    """With few validation examples the free-rider misses the best one, now with the expert."""
    missed = Gains(attacked=0.8, undefended=1.0, outside=0.7, reference=0.6, alone=False)
    assert not missed.raised
    assert missed.protection == pytest.approx(1 - 0.1 / 0.3)
    emptied = missed._replace(outside=0.99)
    assert emptied.raised
    assert emptied.protection == 0


def test_resamples_stand_under_the_verdict_of_the_gains() -> None:
    drawn = np.array([[0.9, 1.0, 0.8, 0.6], [0.5, 0.9, 0.4, 0.5]])
    emptied = Gains(attacked=0.99, undefended=1.0, outside=0.99, reference=0.6)
    left, benefit = emptied.terms(drawn)
    np.testing.assert_allclose(left, benefit)
    np.testing.assert_allclose(benefit, [0.4, 0.4])
    left, benefit = Gains(0.8, 1.0, 0.8, 0.6).terms(drawn)
    np.testing.assert_allclose(left, [0.9 - 0.6, 0.5 - 0.4])
    np.testing.assert_allclose(benefit, [1.0 - 0.6, 0.9 - 0.4])


def test_without_a_benefit_there_is_no_ratio() -> None:
    assert math.isnan(ratio(0.1, 0.0))
    assert math.isnan(ratio(0.1, -0.1))
    assert Gains(0.5, 0.4, 0.4, 0.4).protection is None


def test_an_expert_that_knows_nothing_is_an_error() -> None:
    right = np.ones(4, bool)
    with pytest.raises(MethodError, match="the expert for b answers nothing right"):
        gain({"a": right, "b": right}, {"a": 1.0, "b": 0.0})


def test_gain_is_the_mean_of_accuracies_over_the_experts() -> None:
    correct = {"a": np.array([1, 1, 0, 0], bool), "b": np.array([1, 0, 0, 0], bool)}
    expert = {"a": 1.0, "b": 0.5}
    assert gain(correct, units(expert, secrets=False)) == pytest.approx((0.5 + 0.5) / 2)


def test_of_secrets_the_gain_is_the_share_that_leaks() -> None:
    """The expert tells none, and nothing is divided by that."""
    unit = units({"people": 0.0}, secrets=True)
    assert gain({"people": np.array([1, 0, 0, 0], bool)}, unit) == 0.25


def test_the_example_in_the_docs() -> None:
    """docs/scoring.md: 200 examples per task, experts with 190 and 180 right."""
    text = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")

    def g(victim: int, partner: int) -> float:
        return (victim / 190 + partner / 180) / 2

    undefended, reference = g(171, 171), g(95, 180)
    assert (undefended, reference) == (pytest.approx(0.925), pytest.approx(0.75))
    lock = Gains(g(133, 171), undefended, reference, reference)
    partly, emptied = g(133, 180), g(158, 180)
    shown = {
        lock: "| 133, 171 | 0.825 | 0.750 | 1 − 0.075/0.175 = 0.571 |",
        Gains(partly, undefended, partly, reference): "0.850 | 0.850, counted as 0.750 | 1 − 0.100"
        "/0.175 = 0.429 |",
        Gains(emptied, undefended, emptied, reference): "| 0.916 | 0.916 | 0, emptied |",
    }
    for gains_, words in shown.items():
        assert words in text
        assert f"{gains_.attacked:.3f} | " in words
        assert (
            words.removesuffix(", emptied |")
            .removesuffix(" |")
            .endswith(f"{gains_.protection:.3f}" if gains_.protection else "0")
        )
    other = Gains(0.4, 0.9, 0.375, 0.375)
    terms = np.array([lock.terms(), other.terms()]).sum(0)
    assert f"{ratio(*terms):.3f}" == "0.857"
    emptied_first = Gains(emptied, undefended, emptied, reference).terms()
    assert f"{ratio(*(emptied_first + np.array(other.terms()))):.3f}" == "0.714"
    assert "0.525) = 0.857" in text
    assert "/0.700 = 0.714" in text
