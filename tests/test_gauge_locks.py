"""Defenses drawn from the whole gauge group: exact, undone by their key, and by alignment."""

from __future__ import annotations

import pytest
import torch
import zoo
from conftest import some_slow
from test_attacks import distance, knowledge, setting
from test_posthoc_defenses import owner
from zoo import TOLERANCE, generator

from attacks.gauge_align import GaugeAlign
from attacks.residual_align import ResidualAlign
from benchmark.anatomy import gauges
from benchmark.api.contracts import Attack, Defense, Victim
from benchmark.core.errors import MethodError
from benchmark.core.state import digest, task_vector
from defenses.full_gauge import OUTSIDE, FullGauge
from defenses.random_permutation import RandomPermutation
from defenses.residual_lock import ResidualLock

LOCKS: list[FullGauge] = [FullGauge(), ResidualLock(), RandomPermutation()]


def victim(family: str) -> Victim:
    base, expert, _, anatomy = setting(family)
    return owner(base, expert, anatomy)


def _has_none(lock: FullGauge, family: str) -> bool:
    """Whether no row knows what lies outside the blocks, and no bias is there: refused, then."""
    if family not in zoo.decoders.MIXTURES or not isinstance(lock, ResidualLock):
        return False
    with pytest.raises(MethodError, match="has none of the gauges"):
        lock.protect(victim(family), generator(3))
    return True


def name(method: Defense) -> str:
    return type(method).__name__


@pytest.mark.parametrize("family", some_slow([*zoo.NAMES], {*zoo.KIN}))
@pytest.mark.parametrize("lock", LOCKS, ids=name)
def test_the_key_opens_it(lock: FullGauge, family: str) -> None:
    _, expert, _, anatomy = setting(family)
    model, inputs = zoo.tiny(family)
    if _has_none(lock, family):
        return
    released = lock.protect(victim(family), generator(3))
    assert zoo.drift(model, expert, released, inputs) <= TOLERANCE
    assert distance(released, expert, expert, released) > 0
    opened = lock.unlock(released, anatomy, generator(3))
    for key, value in expert.items():
        torch.testing.assert_close(opened[key], value, rtol=1e-4, atol=1e-5)
    wrong = lock.unlock(released, anatomy, generator(4))
    assert any(not torch.allclose(wrong[key], value, atol=1e-3) for key, value in expert.items())


@pytest.mark.parametrize("family", some_slow([*zoo.NAMES], {*zoo.KIN}))
def test_what_moves_is_where_it_says(family: str) -> None:
    _, expert, _, anatomy = setting(family)
    kinds = set(gauges.of(anatomy, expert).kinds)
    assert {"query-key", "value-output"} & kinds
    blocks = FullGauge(gauges.BLOCKS).protect(victim(family), generator(3))
    inside = {slot.key for block in anatomy.attention for part in block.linears().values()
              for slot in part.slots()}  # fmt: skip
    inside |= {slot.key for block in anatomy.attention if block.whole_norm
               for slot in block.qk_norm or ()}  # fmt: skip
    inside |= {axis.slot.key for units in anatomy.units for axis in units.axes}
    assert set(task_vector(blocks, expert)) <= inside
    # The residual axis has both its ends in the State only where there is a head.
    renamed = RandomPermutation(("stream-permutation",))
    if "stream-permutation" in kinds:
        assert set(task_vector(renamed.protect(victim(family), generator(3)), expert)) - inside
    else:
        with pytest.raises(MethodError, match="has none of the gauges stream-permutation"):
            renamed.protect(victim(family), generator(3))


@pytest.mark.parametrize("family", some_slow([*zoo.NAMES], {*zoo.KIN}))
@pytest.mark.parametrize(
    ("lock", "attack", "undone"),
    [
        (FullGauge(), GaugeAlign(), True),
        (ResidualLock(), GaugeAlign(), True),
        (ResidualLock(), ResidualAlign(), True),
        (FullGauge(), ResidualAlign(), False),
    ],
    ids=["full", "residual", "residual-by-residual", "full-by-residual"],
)
def test_alignment_undoes_it(lock: FullGauge, attack: Attack, undone: bool, family: str) -> None:
    """In lengths of τ: where the lock leaves the release, and where the attack brings it."""
    base, expert, _, _ = setting(family)
    if _has_none(lock, family):
        return
    released = lock.protect(victim(family), generator(5))
    found = attack.recover(released, knowledge(family), generator(0))
    assert distance(released, expert, base, expert) > 4
    assert (distance(found, expert, base, expert) < 1) is undone


@pytest.mark.parametrize("family", some_slow([*zoo.NAMES], {*zoo.KIN}))
def test_an_undefended_expert_is_left_alone(family: str) -> None:
    base, expert, _, _ = setting(family)
    found = GaugeAlign().recover(expert, knowledge(family), generator(0))
    # Tiny models have as many gauges as a third of their weights: what is left counts.
    near = distance(found, base, base, expert)
    assert digest(found) == digest(expert) or near < 0.99


def test_wrong_names_are_told() -> None:
    with pytest.raises(ValueError, match="unknown gauge 'norm-gian'; there are stream-rotation"):
        FullGauge(("norm-gian",))
    with pytest.raises(ValueError, match="unknown gauge 'stream-scale'"):
        FullGauge(("stream-scale",))
    with pytest.raises(MethodError, match="'norm-gain@decoder'"):
        FullGauge(("norm-gain@decoder",)).protect(victim("vit"), generator(0))


def test_together_they_are_the_group() -> None:
    assert not set(OUTSIDE) & set(gauges.BLOCKS)
    assert set(OUTSIDE) | set(gauges.BLOCKS) == set(FullGauge().kinds)
