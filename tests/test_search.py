"""The race on validation: finds the best, and spends little on the hopeless."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.evaluation.search import ERROR, Racer, race

RUNGS = (8, 32, 128)


def table(rates: list[float], seed: int = 0) -> dict[str, np.ndarray]:
    """Outcomes of models of the given accuracies on 128 examples, equally hard for all."""
    hardness = np.random.default_rng(seed).random(128)
    return {str(i): hardness < rate for i, rate in enumerate(rates)}


def run(outcomes: dict[str, np.ndarray], rungs: tuple[int, ...] = RUNGS, known: str = ""):
    racers = [Racer(name, safe=name == known) for name in outcomes]
    asked: list[tuple[str, range]] = []

    def correct(name: str, task: str, rows: range) -> np.ndarray:
        asked.append((name, rows))
        return outcomes[name][rows.start : rows.stop]

    return race(racers, correct, {"task": 1.0}, rungs), racers, asked


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 100))
def test_with_one_rung_the_race_is_exhaustive(rates: list[float], seed: int) -> None:
    outcomes = table(rates, seed)
    found, _, _ = run(outcomes, rungs=(128,))
    best = max(outcomes, key=lambda name: outcomes[name].mean())
    assert found.ranked[0].name == best
    assert found.passes == found.exhaustive == 128 * len(rates)
    assert found.bound == 0


def test_the_hopeless_see_eight_examples_and_the_best_sees_all() -> None:
    outcomes = table([0.05, 0.95, 0.02, 0.9, 0.0, 0.1])
    found, racers, _ = run(outcomes)
    assert found.ranked[0].name == "1"
    assert {r.name: r.seen for r in racers} == {"0": 8, "1": 128, "2": 8, "3": 128, "4": 8, "5": 8}
    assert (found.passes, found.exhaustive) == (4 * 8 + 2 * 128, 6 * 128)
    assert found.bound == 0, "nobody was dropped without evidence"


def test_a_known_leader_ends_the_race_for_candidates_far_behind_it() -> None:
    outcomes = table([0.03, 0.05, 0.97])
    _, racers, _ = run(outcomes, known="2")
    assert [r.seen for r in racers] == [8, 8, 128]


def test_a_known_candidate_is_never_dropped() -> None:
    found, _, _ = run(table([0.9, 0.95, 0.99, 0.0]), known="3")
    assert "3" in {r.name for r in found.ranked}


@given(st.lists(st.floats(0.3, 1), min_size=2, max_size=12), st.integers(0, 50))
def test_what_the_race_loses_against_exhaustive_search_is_small(
    rates: list[float], seed: int
) -> None:
    outcomes = table(rates, seed)
    found, _, _ = run(outcomes)
    best = max(bits.mean() for bits in outcomes.values())
    # Equally hard examples: an ordering on a prefix holds on the whole, up to ties there.
    assert best - outcomes[found.ranked[0].name].mean() <= 0.35


def test_the_stated_bound_holds_as_often_as_it_says() -> None:
    """Independent outcomes of 40 models: the truly best is seldom better by more than the bound."""
    rng = np.random.default_rng(3)
    broken, saved, loose = 0, [], []
    trials = 200
    for _ in range(trials):
        rates = rng.uniform(0.4, 0.95, 40)
        outcomes = {str(i): rng.random(256) < rate for i, rate in enumerate(rates)}
        found, racers, _ = run(outcomes, rungs=(16, 32, 64, 128, 256))
        dropped = [float(rates[int(r.name)]) for r in racers if r.seen < 256]
        # The winner is the best of the survivors as measured; the bound is about the dropped.
        whole = max(float(rates[int(r.name)]) for r in found.ranked if r.seen == 256)
        broken += max(dropped) - whole > found.bound
        saved.append(found.passes / found.exhaustive)
        loose.append(found.bound)
    assert broken / trials <= ERROR
    assert np.mean(saved) < 0.2
    assert 0 < np.mean(loose) < 0.5, "a bound that says something"


def test_of_a_crowd_that_looks_alike_the_strong_go_on() -> None:
    """40 models that all get the first 16 examples wrong; the last of them get the rest right."""
    late = np.arange(128) >= 16
    outcomes = {str(i): late & (i >= 36) for i in range(40)}
    found, _, _ = run(outcomes, rungs=(8, 16, 32, 128))
    assert int(found.ranked[0].name) >= 36


def test_no_example_is_asked_for_twice() -> None:
    _, _, asked = run(table([0.9, 0.92, 0.5]))
    seen = [(name, row) for name, rows in asked for row in rows]
    assert len(seen) == len(set(seen))


def test_tasks_count_equally_after_normalisation() -> None:
    racer = Racer("a", correct={"easy": np.array([True, True]), "hard": np.array([True, False])})
    assert racer.outcomes({"easy": 1.0, "hard": 0.5}).mean() == pytest.approx((1 + 1) / 2)
