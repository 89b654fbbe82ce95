"""Channels of ConvNeXt and ResNet: renaming keeps the function, matching undoes it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import zoo
from conv_digits import ConvDigits
from torch import Tensor, nn
from zoo import TOLERANCE, generator, perturbed

from benchmark.anatomy import Anatomy, Channels, MLPBlock, permute_units
from benchmark.anatomy.alignment import match_all
from benchmark.anatomy.diagnosis import diagnose
from benchmark.anatomy.gauge import scale_units
from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Setting
from benchmark.api.methods import attack, defense, merger
from benchmark.conformance.scenes import scene
from benchmark.conformance.subjects import victim
from benchmark.conformance.testbed import Tiny
from benchmark.core.errors import AssetError, CheckpointError, MethodError, UsageError
from benchmark.core.state import (
    State,
    compatible,
    norm,
    statistic,
    task_vector,
    with_variances,
)
from benchmark.learn.training import fine_tune


@functools.cache
def setting(name: str) -> tuple[nn.Module, dict[str, Tensor], State, Anatomy]:
    model, inputs = zoo.tiny(name)
    return model, inputs, zoo.state_of(model), Anatomy.of(model)


def renamed(state: State, anatomy: Anatomy, seed: int) -> tuple[State, list[Tensor]]:
    """Every group permuted at random, and the permutations."""
    rng, out = generator(seed), dict(state)
    orders = [torch.randperm(units.width(out), generator=rng) for units in anatomy.units]
    for units, order in zip(anatomy.units, orders, strict=True):
        permute_units(out, units, order)
    return out, orders


@pytest.mark.parametrize("name", zoo.CONVOLUTIONAL)
def test_renaming_every_channel_keeps_the_function(name: str) -> None:
    model, inputs, state, anatomy = setting(name)
    released, _ = renamed(state, anatomy, seed=3)
    compatible(released, state, "the renamed model")
    moved = [key for key in state if not torch.equal(released[key], state[key])]
    assert len(moved) > 0.6 * len([key for key in state if state[key].ndim])
    assert zoo.drift(model, state, released, inputs) <= TOLERANCE


@pytest.mark.parametrize("name", ["convnextv2", "resnet-bottleneck", "timm-convnext"])
def test_no_axis_may_be_left_out(name: str) -> None:
    """Or the groups would be smaller than they are, and the rest of the test prove nothing."""
    model, inputs, state, anatomy = setting(name)
    rng = generator(5)
    for units in anatomy.units:
        order = torch.randperm(units.width(state), generator=rng)
        for skipped in range(len(units.axes)):
            out = dict(state)
            for i, axis in enumerate(units.axes):
                if i != skipped:
                    axis.write(out, axis.read(state)[order])
            assert zoo.drift(model, state, out, inputs) > 1e-3, (units, skipped)


def test_the_last_stream_is_free_only_where_the_model_reads_it() -> None:
    for whole, bare in (("convnext", "convnext-bare"), ("resnet", "resnet-bare")):
        assert len(setting(whole)[3].channels) == len(setting(bare)[3].channels) + 1
    widest = max(c.width(setting("convnext-bare")[2]) for c in setting("convnext-bare")[3].channels)
    assert widest == 8  # that of stage 1, which has 16, is what comes out
    for name, reader in (
        ("convnext", "classifier.weight"),
        ("resnet", "classifier.1.weight"),
        ("timm-convnext", "head.fc.weight"),
        ("timm-resnet", "fc.weight"),
        ("open-clip-resnet", "visual.attnpool.positional_embedding"),
        ("open-clip-convnext", "visual.head.proj.weight"),
    ):
        keys = {axis.slot.key for channels in setting(name)[3].channels for axis in channels.axes}
        assert reader in keys


def test_blocks_are_what_methods_can_use() -> None:
    state, anatomy = setting("convnext")[2:]
    assert anatomy.attention == ()
    assert len(anatomy.mlp) == 3
    assert {mlp.activation for mlp in anatomy.mlp} == {"gelu"}
    assert [mlp.width(state) for mlp in anatomy.mlp] == [32, 32, 64]
    assert setting("convnextv2")[3].mlp == ()  # a response norm stands before pwconv2
    assert len(setting("open-clip-resnet")[3].attention) == 2  # the text tower's, and the pool
    scaled = [c for c in setting("resnet")[3].channels if c.unit_scale]
    assert len(scaled) == 4  # one between the convolutions of each block


@pytest.mark.parametrize("cost", ["inner", "cosine"])
@pytest.mark.parametrize("name", zoo.CONVOLUTIONAL)
def test_weight_matching_recovers_the_permutation(name: str, cost: str) -> None:
    _, _, base, anatomy = setting(name)
    expert, partner = perturbed(base, 0.03, seed=1), perturbed(base, 0.03, seed=2)
    released, orders = renamed(expert, anatomy, seed=7)
    for anchor in (base, partner):
        found = match_all(anatomy, released, anchor, cost)  # type: ignore[arg-type]
        for units, order, back in zip(anatomy.units, orders, found, strict=True):
            assert torch.equal(order[back], torch.arange(len(order))), units
        identity = match_all(anatomy, expert, anchor, cost)  # type: ignore[arg-type]
        assert all(torch.equal(order, torch.arange(len(order))) for order in identity)


def test_a_far_release_never_ends_farther_than_it_was() -> None:
    _, _, base, anatomy = setting("resnet-bottleneck")
    for seed in range(3):
        released, _ = renamed(perturbed(base, 0.8, seed), anatomy, seed)
        out = dict(released)
        for units, order in zip(anatomy.units, match_all(anatomy, released, base), strict=True):
            permute_units(out, units, order)

        def far(state: State) -> float:
            """In units of each tensor's own scale, as matching counts."""
            keys = {axis.slot.key for units in anatomy.units for axis in units.axes}
            gaps = ((state[key] - base[key]).norm() / base[key].norm() for key in keys)
            sizes = (base[key].numel() for key in keys)
            return sum(float(gap) ** 2 * n for gap, n in zip(gaps, sizes, strict=True))

        assert far(out) < far(released)


def test_gauge_align_undoes_factors_under_relu() -> None:
    model, inputs, base, anatomy = setting("resnet-bottleneck")
    expert = perturbed(base, 0.02, seed=4)
    released, _ = renamed(expert, anatomy, seed=9)
    rng = generator(11)
    for channels in anatomy.channels:
        if channels.unit_scale:
            factors = torch.rand(channels.width(base), generator=rng) * 4 + 0.25
            scale_units(released, channels, factors)
    assert zoo.drift(model, expert, released, inputs) <= TOLERANCE
    recovered = align(released, base, anatomy)
    assert zoo.drift(model, expert, recovered, inputs) <= TOLERANCE
    was, left = (norm(task_vector(s, base)) for s in (expert, recovered))
    assert left <= 1.001 * was < 0.2 * norm(task_vector(released, base))


def test_diagnosis_names_the_permutation() -> None:
    _, _, base, anatomy = setting("convnextv2")
    expert = perturbed(base, 0.02, seed=4)
    released, _ = renamed(expert, anatomy, seed=9)
    found, plain = diagnose(released, base, anatomy), diagnose(expert, base, anatomy)
    assert found.summary.startswith("looks like a permutation of channels; undone")
    assert found.units_moved > 0.8
    assert found.blocks == 0
    assert plain.summary.startswith("no lock found")
    assert plain.units_moved == 0


@pytest.mark.parametrize("spec", ["params(scaling=none)", "params(perm=random)", "params"])
@pytest.mark.parametrize("name", ["weight-matching", "gauge-align", "product-space", "canonical"])
def test_attacks_undo_what_defenses_permute(spec: str, name: str) -> None:
    testbed = Tiny("resnet")
    owner = victim(testbed)
    released = defense(spec).method.protect(owner, generator(0))
    assert any(not torch.equal(released[k], owner.expert[k]) for k in released if statistic(k))
    known = scene(testbed, Access.WEIGHTS, lock=False).knowledge
    attacker = attack(name).method
    if name == "canonical":  # brings everyone to the partner's order; the base was there already
        recovered = attacker.members(released, known, generator(0)).released
    else:
        recovered = attacker.recover(released, known, generator(0))
    far, was, left = (norm(task_vector(s, owner.base)) for s in (released, owner.expert, recovered))
    assert far > 2 * was
    assert left <= 1.0001 * was
    if name != "gauge-align":  # which scales, too, what ReLU leaves free
        keys = owner.expert.keys()
        assert all(torch.allclose(recovered[k], owner.expert[k], atol=1e-5) for k in keys)


def test_training_leaves_the_running_statistics() -> None:
    testbed = Tiny("resnet")
    base, task = testbed.base(), testbed.task("first")
    trained = fine_tune(testbed, {"first": task}, base, {"first": task.train}, generator(1))
    moved = task_vector(trained, base)
    assert any(key.endswith("normalization.weight") for key in moved)
    assert not any(statistic(key) for key in moved)
    assert {k for k in base if statistic(k)}
    assert "layer.1.convolution" in " ".join(moved)
    for key in base:
        if key.endswith("num_batches_tracked") or statistic(key):
            assert trained[key] is base[key]


def test_trap2_trains_through_batch_norms() -> None:
    owner = victim(Tiny("resnet"))
    released = defense("trap2(weight=0.1)").method.protect(owner, generator(0))
    compatible(released, owner.base, "the release")
    moved = task_vector(released, owner.base)
    assert len(moved) > 5
    assert not any(statistic(key) for key in moved)


@pytest.mark.parametrize("spec", ["average", "task-arithmetic", "ties", "dare", "tsv", "slerp"])
def test_mergers_treat_statistics_as_weights_and_integers_as_none(spec: str) -> None:
    _, _, base, _ = setting("resnet")
    experts = [perturbed(base, 0.02, seed) for seed in (1, 2)]
    for i, expert in enumerate(experts):
        for key in expert:
            if key.endswith("num_batches_tracked"):
                expert[key] = expert[key] + 100 * (i + 1)
    method = merger(spec).method
    merged = method.merge(base, experts, Setting((0.5, 0.5)), None, generator(0))
    compatible(merged, base, "the merge")
    for key, value in base.items():
        if key.endswith("num_batches_tracked"):
            assert torch.equal(merged[key], value)
            assert value == 7
    assert any(not torch.equal(merged[key], base[key]) for key in base if statistic(key))


def test_a_negative_variance_is_an_error() -> None:
    base = setting("resnet")[2]
    key = next(key for key in base if key.endswith("running_var"))
    broken = {**base, key: base[key] - 2 * base[key].max()}
    with pytest.raises(CheckpointError, match=f"the merge: tensor '{key}' holds a negative var"):
        compatible(broken, base, "the merge")


def test_a_merge_of_variances_stops_at_zero() -> None:
    """Twice an expert less the base: what a free-rider's coefficient of 2 asks for."""
    base = setting("resnet")[2]
    key = next(key for key in base if key.endswith("running_var"))
    other = next(key for key in base if key.endswith("running_mean"))
    expert = {**base, key: base[key] / 4, other: base[other] - 1}
    method = merger("task-arithmetic").method
    merged = method.merge(base, [expert], Setting((2.0,)), None, generator(0))
    assert bool((merged[key] < 0).all())
    mended = with_variances(merged)
    compatible(mended, base, "the merge")
    assert torch.equal(mended[key], torch.zeros_like(base[key]))
    assert mended[other] is merged[other]
    assert with_variances(mended) is mended


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("mergelock", "mergelock acts on attention, and resnet-transformers has none"),
        ("mergebarrier-attn", "mergebarrier-attn acts on attention"),
        ("arf", "arf acts on attention"),
        ("params(perm=identity)", "scaling without a permutation acts on attention"),
        ("mergebarrier-taylor", "mergebarrier-taylor acts on MLPs"),
        ("trap2(weight=0.1, adapter=lora)", "LoRA finds no attention weight"),
    ],
)
def test_what_needs_attention_says_so_in_one_line(spec: str, what: str) -> None:
    with pytest.raises(MethodError, match=what.replace("(", r"\(")) as error:
        defense(spec).method.protect(victim(Tiny("resnet")), generator(0))
    assert "\n" not in str(error.value)


def test_norm_inflation_scales_what_relu_frees() -> None:
    owner = victim(Tiny("resnet"))
    released = defense("norm-inflation").method.protect(owner, generator(0))
    key = "encoder.stages.0.layers.0.layer.1.convolution.weight"
    assert torch.allclose(released[key] * 20, owner.expert[key])


def _timm(**fields: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.resnet import BasicBlock, Bottleneck, ResNet

        kind = Bottleneck if "cardinality" in fields else BasicBlock
        return ResNet(kind, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=5, **fields)  # type: ignore[arg-type]

    return build


def _backbone() -> nn.Module:
    from transformers import ConvNextBackbone, ConvNextConfig

    return ConvNextBackbone(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (_timm(cardinality=4, base_width=64), "grouped convolutions are not supported"),
        (
            _timm(block_args={"attn_layer": "se"}),
            r"tensor 'layer1.0.se.fc1.weight' \(and .* more\)",
        ),
        (_backbone, "its class ConvNextBackbone is none of ConvNextModel"),
    ],
)
def test_what_no_row_answers_for_is_refused(build: Callable[[], nn.Module], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Anatomy.of(build())


def test_a_resnet_without_batch_norms_is_refused() -> None:
    model = _timm()()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.GroupNorm(2, module.num_features))
    with pytest.raises(UsageError, match="of its norms only BatchNorm"):
        Anatomy.of(model)


def test_units_hold_every_slot_once() -> None:
    for name in zoo.CONVOLUTIONAL:
        places = [
            (axis.slot.key, axis.slot.rows, axis.dim)
            for units in setting(name)[3].units
            for axis in units.axes
        ]
        assert len(places) == len(set(places))
        assert all(isinstance(u, MLPBlock | Channels) for u in setting(name)[3].units)


@pytest.mark.slow
def test_on_real_digits_a_permutation_destroys_the_merge_and_matching_restores_it(
    home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    testbed = ConvDigits("resnet")
    names = ("mnist-low", "digits-high")
    try:
        tasks = {name: testbed.task(name) for name in names}
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    base, anatomy = testbed.base(), testbed.anatomy()
    expert, partner = (
        fine_tune(testbed, {n: task}, base, {n: task.train}, generator(1))
        for n, task in tasks.items()
    )
    released, _ = renamed(expert, anatomy, seed=0)
    recovered = dict(released)
    for units, order in zip(anatomy.units, match_all(anatomy, released, base), strict=True):
        permute_units(recovered, units, order)
    assert all(torch.equal(recovered[key], value) for key, value in expert.items())

    def accuracy(victim: State) -> list[float]:
        merge = merger("task-arithmetic").method
        merged = merge.merge(base, [victim, partner], Setting((0.6, 0.6)), None, generator(0))
        with torch.no_grad():
            return [
                float((testbed.features(merged, t.test.inputs) @ t.head.T).argmax(1).eq(
                    t.test.labels).float().mean())
                for t in tasks.values()
            ]  # fmt: skip

    plain, locked = accuracy(expert), accuracy(released)
    assert min(plain) > 0.75
    assert all(b < a - 0.2 for a, b in zip(plain, locked, strict=True))
    assert accuracy(recovered) == plain
