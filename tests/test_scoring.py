"""Protection as the share of merging's benefit that a defense takes away."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.core.errors import MethodError
from benchmark.evaluation.scoring import NO_BENEFIT, gain, protection

gains = st.floats(0, 1.2)


@given(gains, gains)
def test_protection_is_zero_where_all_is_restored(undefended: float, outside: float) -> None:
    value = protection(undefended, undefended, outside)
    assert value is None if undefended - outside < NO_BENEFIT else value == pytest.approx(0)


@given(gains, gains)
def test_protection_is_one_where_merging_gains_nothing(undefended: float, outside: float) -> None:
    value = protection(outside, undefended, outside)
    assert value is None if undefended - outside < NO_BENEFIT else value == 1


@given(gains, gains, gains, gains)
def test_protection_falls_as_the_attacker_gains(a: float, b: float, top: float, out: float) -> None:
    low, high = sorted((a, b))
    first, second = protection(low, top, out), protection(high, top, out)
    if first is not None and second is not None:
        assert first >= second


def test_protection_is_not_clipped() -> None:
    assert protection(0.4, 1.0, 0.5) == pytest.approx(1.2)
    assert protection(1.1, 1.0, 0.5) == pytest.approx(-0.2)


def test_an_expert_that_knows_nothing_is_an_error() -> None:
    right, wrong = np.ones(4, bool), np.zeros(4, bool)
    with pytest.raises(MethodError, match="the expert for b answers nothing right"):
        gain({"a": right, "b": right}, {"a": right, "b": wrong})


def test_gain_is_the_mean_of_accuracies_over_the_experts() -> None:
    correct = {"a": np.array([1, 1, 0, 0], bool), "b": np.array([1, 0, 0, 0], bool)}
    expert = {"a": np.array([1, 1, 1, 1], bool), "b": np.array([1, 1, 0, 0], bool)}
    assert gain(correct, expert) == pytest.approx((0.5 + 0.5) / 2)
