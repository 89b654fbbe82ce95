"""Generators of images by diffusers: where their blocks and channels lie, and their gauges."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
import zoo
from conftest import some_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import TOLERANCE, generator

from benchmark.anatomy import Anatomy, gauges, permute_units
from benchmark.anatomy.nest import Nest
from benchmark.core.errors import UsageError

KIN = {"unet", "unet-scale-shift", "unet-sdxl", "sd3.5"}
SEEDS = st.integers(0, 2**16)


@pytest.mark.parametrize("name", zoo.DIFFUSION)
def test_generators_are_covered_whole(name: str) -> None:
    anatomy = Anatomy.of(zoo.tiny(name)[0])
    assert anatomy.uncovered == ()
    assert anatomy.attention
    assert anatomy.mlp
    assert bool(anatomy.channels) == name.startswith("unet")
    joint = {block.joint is not None for block in anatomy.attention}
    assert joint == {"sd3": {True}, "sd3.5": {True, False}, "flux": {True, False}}.get(
        name, {False}
    )


@pytest.mark.parametrize("name", some_slow(list(zoo.DIFFUSION), KIN))
@settings(max_examples=1)
@given(SEEDS)
def test_an_element_of_each_gauge_draws_the_same(name: str, seed: int) -> None:
    model, inputs = zoo.tiny(name)
    state, rng = zoo.state_of(model), generator(seed)
    for gauge in gauges.of(model, state).gauges:
        moved = gauge.apply(state, gauge.draw(rng))
        assert zoo.drift(model, state, moved, inputs) <= 10 * TOLERANCE, gauge.name


@pytest.mark.parametrize("name", some_slow(list(zoo.DIFFUSION), KIN))
@settings(max_examples=1)
@given(SEEDS)
def test_aligning_forgets_all_of_them(name: str, seed: int) -> None:
    model, _ = zoo.tiny(name)
    base, rng = zoo.state_of(model), generator(seed)
    group = gauges.of(model, base)
    assert not [said for said in group.missing if "block" in said]
    expert = zoo.perturbed(base, 0.05, seed)
    locked = dict(expert)
    for gauge in group.gauges:
        gauge.move(locked, gauge.draw(rng))
    plain, found = group.align(expert, base), group.align(locked, base)
    for key, value in plain.items():
        assert torch.allclose(found[key], value, atol=2e-4, rtol=1e-4), key


def test_both_streams_move_along() -> None:
    """Half of a joint attention moved is another function."""
    model, inputs = zoo.tiny("sd3")
    state, block = zoo.state_of(model), Anatomy.of(model).attention[0]
    assert block.joint is not None
    alone, _ = block.streams()
    for name in ("q", "k"):
        half = dict(state)
        alone.write(half, name, -alone.read(half, name))
        assert zoo.drift(model, state, half, inputs) > 10 * TOLERANCE
        both = dict(half)
        block.write(both, name, -block.read(state, name))
        other = "k" if name == "q" else "q"
        block.write(both, other, -block.read(state, other))
        assert zoo.drift(model, state, both, inputs) <= TOLERANCE


def test_channels_stay_in_the_groups_of_their_norms() -> None:
    model, inputs = zoo.tiny("unet")
    state, bound = zoo.state_of(model), 0
    for units in Anatomy.of(model).channels:
        width = units.width(state)
        moved = dict(state)
        permute_units(moved, units, torch.arange(width).roll(1))
        if units.nest is not None:
            bound += zoo.drift(model, state, moved, inputs) > 10 * TOLERANCE
        else:  # the embedding of time
            assert zoo.drift(model, state, moved, inputs) <= TOLERANCE
    assert bound > 10


def test_what_was_not_checked_is_refused() -> None:
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    small = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
    model = UNet2DModel(
        block_out_channels=(8, 8), down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"), **small,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"down_blocks\.0 is a SkipDownBlock2D"):
        Anatomy.of(model)
    build, _ = zoo.diffusion.MODELS["dit"]
    model = build()
    for module in model.modules():
        if isinstance(module, Attention):
            module.processor = JointAttnProcessor2_0()
    with pytest.raises(UsageError, match="JointAttnProcessor2_0, was not checked"):
        Anatomy.of(model)


# -- nests ---------------------------------------------------------------------------------------


def groups(*ends: int) -> list[tuple[int, int, str]]:
    """Parts that lie one behind the other, all of one norm."""
    return [(start, stop, f"norm{len(ends)}") for start, stop in pairwise(ends)]


@pytest.mark.parametrize(
    "parts",
    [
        groups(0, 2, 4, 6),
        groups(0, 3, 6),
        [*groups(0, 2, 4, 6), (0, 4, "skip"), (4, 6, "skip, part 0")],
        [(0, 4, "a"), (2, 6, "b")],
        [(0, 6, "whole")],
        [(0, 2, "a")],
    ],
)
def test_a_nest_has_the_permutations_that_keep_its_parts(parts: list) -> None:
    """All of them, except where parts cross, and the best is the best of them."""
    nest, width = Nest.of(6, parts), 6

    def kept(order: tuple[int, ...]) -> bool:
        """Whether every part's channels are again those of a part of the same norm."""
        sets = {(frozenset(range(a, b)), mark) for a, b, mark in parts}
        return all((frozenset(order[a:b]), mark) in sets for a, b, mark in parts)

    allowed = {order for order in permutations(range(width)) if kept(order)}
    if nest is None:
        assert len(allowed) == 720
        return
    rng = generator(0)
    drawn = {tuple(nest.shuffled(rng).tolist()) for _ in range(2000)}
    assert drawn <= allowed
    crossing = parts == [(0, 4, "a"), (2, 6, "b")]
    assert len(drawn) == (8 if crossing else len(allowed))
    similarity = torch.randn(width, width, generator=rng, dtype=torch.float64)
    rows = torch.arange(width)
    best = nest.assign(similarity)
    values = [float(similarity[rows, list(order)].sum()) for order in drawn]
    assert float(similarity[rows, best].sum()) == pytest.approx(max(values))
