"""More attacks on weights alone: against formulas, and tricks they must see through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from scipy.linalg import orthogonal_procrustes
from test_attacks import distance, lock, recover, setting
from zoo import TOLERANCE, generator

from attacks.gauge_align import GaugeAlign
from attacks.rotation_match import RotationMatch, polar
from benchmark.anatomy import Anatomy, apply_qk, apply_vo, permute_units, within
from benchmark.anatomy.alignment import head_sides
from benchmark.core.state import State

# --- rotation-match -------------------------------------------------------------------------------


def turned(state: State, anatomy: Anatomy, factor: bool = False, seed: int = 0) -> State:
    """Rotations (or signs) that the gauge group has, on every head; hidden units renamed."""
    rng, out = generator(seed), dict(state)
    for block in anatomy.attention:
        shape = (block.kv_heads, block.head_dim, block.head_dim)
        draw = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
        qk, vo = polar(within(block, draw[0])), polar(draw[1])
        if factor:
            vo = 3 * vo
            qk = qk if block.qk_norm is not None else qk / 5
        apply_qk(out, block, qk)
        apply_vo(out, block, vo)
    for mlp in anatomy.mlp:
        permute_units(out, mlp, torch.randperm(mlp.width(out), generator=rng))
    return out


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rotation_match_undoes_rotations_and_no_more(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, expert, _, anatomy = setting(name)
    plain = recover(RotationMatch(), expert, name)
    released = turned(expert, anatomy)
    assert distance(released, expert, base, expert) > 5
    found = recover(RotationMatch(), released, name)
    assert distance(found, plain, base, expert) < 0.01
    assert zoo.drift(model, released, found, inputs) <= TOLERANCE
    assert distance(plain, expert, base, expert) < 0.3
    scaled = recover(RotationMatch(rescale=True), turned(expert, anatomy, factor=True), name)
    # A factor weighs Q against K otherwise, so that another rotation is the best one.
    assert distance(scaled, plain, base, expert) < 0.15
    # The published match knows no scaling and no general matrix: gauge-align does.
    released = lock(expert, anatomy, "scaling")
    for attack in (RotationMatch(), RotationMatch(rescale=True)):
        found = recover(attack, released, name)
        assert zoo.drift(model, released, found, inputs) <= TOLERANCE
        assert distance(found, expert, base, expert) > 10
    assert distance(recover(GaugeAlign(), released, name), expert, base, expert) < 0.5


@pytest.mark.parametrize("part", ["qk", "vo"])
def test_rotation_match_is_scipy_s_procrustes(part: str) -> None:
    base, expert, _, anatomy = setting("bert")
    released = lock(expert, anatomy, "general")
    found = recover(RotationMatch(), released, "bert")
    for block in anatomy.attention:
        own, anchor, after = (
            [np.concatenate(sides, 1) for sides in zip(*head_sides(block, s, part), strict=True)]  # type: ignore[arg-type]
            for s in (released, base, found)
        )
        for x, x0, y in zip(own, anchor, after, strict=True):
            rotation, _ = orthogonal_procrustes(x.T, x0.T)
            wanted = rotation.T @ x
            assert np.linalg.norm(y - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_polar_leaves_what_nothing_turns() -> None:
    dead = torch.zeros(1, 4, 4, dtype=torch.float64)
    dead[0, 0, 1], dead[0, 1, 0] = -2, 2
    found = polar(dead)[0]
    assert torch.allclose(found @ found.T, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(found[2:, 2:], torch.eye(2, dtype=torch.float64))
    assert torch.allclose(polar(torch.zeros(1, 3, 3)), torch.eye(3))
