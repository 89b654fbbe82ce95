"""The attack read-shipped: what users run is public, so whoever merges can read it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from broken_dishonest import BehavesOnTinyModels, NoOp, SoundForeign

from attacks.read_shipped import ReadShipped
from benchmark.api.contracts import Access, Defense
from benchmark.conformance import check_attack
from benchmark.conformance.scenes import knowing
from benchmark.conformance.subjects import victim
from benchmark.conformance.testbed import ARCHITECTURES, Architecture, Tiny
from benchmark.core.state import ForeignState, State
from defenses.mergebarrier_taylor import MergeBarrierTaylor
from defenses.params import PaRaMS


def attacked(
    defense: Defense, architecture: Architecture = "vit", **edits: torch.Tensor
) -> tuple[State, State, State]:
    """(expert, released, recovered); ``edits`` stand in for shipped tensors, by name."""
    testbed = Tiny(architecture)
    owner = victim(testbed)
    released = defense.protect(owner, torch.Generator().manual_seed(0))
    shipped = defense.shipped(owner, released, torch.Generator().manual_seed(0))
    knowledge = knowing(testbed, {}, Access.WEIGHTS, testbed.base(), [])
    if isinstance(shipped, ForeignState):
        shipped.update(edits)
        knowledge.shipped = shipped
    rng = torch.Generator().manual_seed(0)
    return owner.expert, released, ReadShipped().recover(released, knowledge, rng)


def same(one: State, other: State) -> set[str]:
    """The names under which both hold the same bits."""
    assert one.keys() == other.keys()
    return {key for key in one if torch.equal(one[key], other[key])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("defense", [NoOp(), MergeBarrierTaylor()], ids=["no-op", "mergebarrier"])
def test_a_changed_module_does_not_hide_the_experts_tensors(
    defense: Defense, architecture: Architecture
) -> None:
    expert, released, recovered = attacked(defense, architecture)
    assert same(recovered, expert) == set(expert)
    assert same(released, expert) != set(expert)


def test_attention_comes_from_what_is_shipped_and_other_names_from_the_release() -> None:
    """A name that is gone, or another shape, dtype or NaN under it, leaves what was released."""
    testbed = Tiny("vit")
    q, up, down, norm = (
        "layers.0.attention.q_proj.weight",
        testbed.anatomy().mlp[0].up.weight.key,
        testbed.anatomy().mlp[0].down.weight.key,
        testbed.anatomy().mlp[1].up.weight.key,
    )
    base = testbed.base()
    unfit = {
        up: torch.zeros(3, 3),
        down: base[down].double(),
        norm: torch.full_like(base[norm], float("nan")),
    }
    expert, released, recovered = attacked(MergeBarrierTaylor(), **unfit)
    assert torch.equal(recovered[q], expert[q])
    for key in unfit:
        assert torch.equal(recovered[key], released[key])
        assert not torch.equal(recovered[key], expert[key])


def test_where_no_modules_are_changed_it_merges_the_release() -> None:
    _, released, recovered = attacked(PaRaMS())
    assert same(recovered, released) == set(released)


def test_what_behaves_on_tiny_models_alone_is_undone_where_it_cheats() -> None:
    """`check` cannot find it (tests/test_conformance_dishonest.py); a run has the real model."""
    owner = victim(Tiny("vit"))
    large = {**owner.expert, "much": torch.zeros(1_000_001)}
    owner = replace(owner, expert=large, base={**owner.base, "much": torch.ones(1_000_001)})
    rng = torch.Generator().manual_seed(0)
    released = BehavesOnTinyModels().protect(owner, rng)
    knowledge = knowing(Tiny("vit"), {}, Access.WEIGHTS, owner.base, [])
    knowledge.shipped = BehavesOnTinyModels().shipped(owner, released, rng)
    recovered = ReadShipped().recover(released, knowledge, rng)
    assert same(recovered, large) == set(large)


def test_a_re_encoded_expert_is_beyond_it() -> None:
    """Doubled tensors are read doubled: what is left is distillation, on the track of its own."""
    expert, _, recovered = attacked(SoundForeign())
    moved = {key: value for key, value in expert.items() if value.is_floating_point()}
    assert all(torch.equal(recovered[key], 2 * value) for key, value in moved.items())


def test_it_keeps_the_contract() -> None:
    report = check_attack(ReadShipped())
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]
