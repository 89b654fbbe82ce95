"""Which gauges of a release were moved: those that were, and no others."""

from __future__ import annotations

import pytest
import zoo
from conftest import some_slow
from test_attacks import distance
from test_posthoc_defenses import owner
from zoo import generator, perturbed

from benchmark.anatomy import Anatomy, diagnosis, gauges
from benchmark.anatomy.diagnosis import diagnose
from benchmark.api.methods import defense
from benchmark.core.state import State, statistic

EVERY = (*zoo.NAMES, *zoo.CONVOLUTIONAL)
#: Every kind of gauge is in one of these; the rest have the same kinds in other places.
QUICK = {"bert-classifier", "vit", "qwen3", "resnet"}
#: The heads and biases of so small a text tower are hardly moved by a lock that draws from shapes.
SMALL = {
    "open-clip-resnet": {"heads", "value-shift", "key-bias"},
    "open-clip-convnext": {"heads"},  # two, which a draw may leave where they are
}
#: Elements of a rotation, which is told in their place.
TURNED = {"stream-permutation", "stream-sign"}


def setting(name: str) -> tuple[State, State, Anatomy, gauges.Group]:
    """Base, expert, anatomy, group. No gradient moves the statistics of a batch norm."""
    model, _ = zoo.tiny(name)
    base, anatomy = zoo.state_of(model), Anatomy.of(model)
    moved = perturbed(base, 0.03, 1)
    expert = {key: base[key] if statistic(key) else value for key, value in moved.items()}
    return base, expert, anatomy, gauges.of(anatomy, expert)


def locked(spec: str, name: str, seed: int = 0) -> State:
    base, expert, anatomy, _ = setting(name)
    return defense(spec).method.protect(owner(base, expert, anatomy), generator(seed))


@pytest.mark.parametrize("name", some_slow([*EVERY], {*EVERY} - QUICK))
def test_single_gauges_are_named(name: str) -> None:
    base, expert, _, group = setting(name)
    for kind in group.kinds:
        only = group.subset((kind,))
        released = only.apply(expert, only.draw(generator(5)))
        found = gauges.moved(group, released, base)
        away = distance(released, base, base, expert)
        if away > 1.3:  # else it was a draw of plus signs, or hardly more than τ
            assert set(found.amounts) == {kind}
            assert 0.4 * away < found.amounts[kind] < 1.2 * away  # others can make up for a part
        assert distance(found.nearest, base, base, expert) < 1.3


@pytest.mark.parametrize("name", some_slow([*EVERY], {*EVERY} - QUICK))
def test_all_are_named_together(name: str) -> None:
    base, _, _, group = setting(name)
    released = locked("full-gauge", name, seed=5)
    found = gauges.moved(group, released, base)
    wanted = set(group.exact.kinds) - SMALL.get(name, set())
    if "stream-rotation" in wanted and not TURNED & set(found.amounts):
        wanted -= TURNED  # in all streams
    assert wanted - {"stream-sign"} <= set(found.amounts) <= set(group.exact.kinds)
    assert found.units > 0.8


@pytest.mark.parametrize("name", some_slow([*EVERY], {*EVERY} - QUICK))
def test_an_undefended_expert_has_no_lock(name: str) -> None:
    base, expert, anatomy, _ = setting(name)
    found = diagnose(expert, base, anatomy)
    unseen = f"; not looked at: {'; '.join(found.missing)}" if found.missing else ""
    assert found.summary == f"no lock found; left as it is{unseen}"
    assert (found.gauges, found.remaining, found.residual) == ({}, {}, 0)


#: On bert, vit and llama.
SAYS = {
    "residual-lock": (
        "looks like null directions of norms with constants on the residual axis, norm shifts, ",
        "looks like a residual rotation with norm gains, constants on the residual axis, ",
        "looks like a residual rotation with norm gains moved; undone; about 0.",
    ),
    "full-gauge": (
        "looks like a per-head general lock with a head permutation, an MLP permutation, null dir",
        "looks like a per-head general lock with a head permutation, an MLP permutation, a residu",
        "looks like a rotation and scale per frequency pair on Q/K with a per-head general lock "
        "on V/O, a head permutation, an MLP permutation, a residual rotation, norm gains and 2 "
        "more moved; undone; about 0.",
    ),
    "random-permutation": (
        "looks like an MLP permutation; undone; the expert itself",
        *2 * ("looks like an MLP permutation with a residual permutation; undone; the expert its",),
    ),
    "mergelock": (
        *2 * ("looks like a per-head general lock; undone; about 0.",),
        "looks like a rotation and scale per frequency pair on Q/K with a per-head general lock "
        "on V/O; undone; about 0.",
    ),
}


@pytest.mark.parametrize("spec", some_slow([*SAYS], {"full-gauge", "residual-lock"}))
def test_heads_are_seen_through_the_rest(spec: str) -> None:
    for name, said in zip(("bert", "vit", "llama"), SAYS[spec], strict=True):
        base, expert, anatomy, _ = setting(name)
        released = locked(spec, name)
        found = diagnose(released, base, anatomy)
        assert found.summary.startswith(said)
        nearest = gauges.moved(gauges.of(anatomy, released), released, base).nearest
        truth = distance(nearest, expert, base, expert)
        # τ is random here; what training leaves along the gauges is less, so the estimate is low.
        assert truth / 1.7 <= found.residual <= truth * 1.1 or spec == "random-permutation"
        # What was not undone is as far away as it is.
        kept = diagnose(released, base, anatomy, released)
        assert kept.residual == pytest.approx(distance(released, expert, base, expert), rel=0.1)
        assert set(kept.remaining) == set(kept.gauges) - {"key-bias"}


def test_what_an_attack_leaves_is_named() -> None:
    base, expert, anatomy, group = setting("vit")
    inside = group.subset(gauges.BLOCKS)
    left = inside.apply(expert, inside.draw(generator(0)))
    found = diagnose(locked("full-gauge", "vit"), base, anatomy, left)
    assert set(found.remaining) == {"heads", "query-key", "value-output", "units"}
    assert "; undone in part: a " in found.summary
    assert found.residual == pytest.approx(distance(left, expert, base, expert), rel=0.1)
    assert found.to_dict()["remaining"] == found.remaining


def test_every_kind_has_words() -> None:
    assert set(diagnosis._NOUNS) == {kind.kind for kind in gauges.KINDS}
