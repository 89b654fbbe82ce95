"""The conformance suite for attacks: every built-in passes, and every check can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import SkipTest

import pytest
import torch
from broken_attackers import SoundEnsemble
from broken_attacks import BROKEN, RemembersWhatItKnew, Sound, SoundTrained
from conftest import some_slow

from benchmark.api import methods
from benchmark.api.contracts import Access, Attack, Knowledge
from benchmark.api.methods import ATTACKS, Named
from benchmark.conformance import (
    ATTACK_CHECKS,
    DEFENSE_CHECKS,
    CheckFailed,
    attack_checks,
    behaviour,
    check_attack,
    honesty,
)
from benchmark.conformance.scenes import scene
from benchmark.conformance.testbed import ARCHITECTURES, Tiny
from benchmark.core.errors import AccessError, UsageError
from benchmark.core.state import State
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group
from benchmark.pipeline.workbench import Workbench

NAMES = tuple(check.name for check in ATTACK_CHECKS.all())

#: The same attacks with less training.
QUICK = {
    "distil-merge": "distil-merge(steps=2)",
    "finetune-recovery": "finetune-recovery(steps=2)",
    "layer-refit": "layer-refit(steps=3)",
    "learned-match": "learned-match(steps=3)",
    "mergetune": "mergetune(draws=2,steps=2)",
    "rinse": "rinse(steps=2)",
    "trap-smooth": "trap-smooth(steps=3)",
}
COMPOSITES = ("head-norm(reference=balanced)+norm-match+nominal-pin", "gauge-align+rinse(steps=1)")
BUILT_IN = [*(QUICK.get(n, n) for n in ATTACKS.names()), *COMPOSITES]


@pytest.mark.parametrize(
    "spec", some_slow(BUILT_IN, {*BUILT_IN} - {"none", "gauge-align", "read-shipped"})
)
def test_every_built_in_keeps_its_contract(spec: str) -> None:
    report = check_attack(spec)
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]
    assert [o.check for o in report.outcomes] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["unlabeled", "labeled"])
def test_every_tier_of_the_standard_attacker_keeps_its_contract(tier: str) -> None:
    assert check_attack(f"auto(tier={tier})", only=["access-tier", "budget", "ensemble"]).passed


def test_names_and_docstrings() -> None:
    assert 15 <= len(NAMES) == len(set(NAMES))
    for check in ATTACK_CHECKS.all():
        assert check.doc.endswith("."), check.name
        assert len(check.doc) <= 110, check.name


def test_what_any_method_must_do_is_checked_by_the_same_code() -> None:
    defense = {check.name: check.function for check in DEFENSE_CHECKS.all()}
    shared = [c for c in ATTACK_CHECKS.all() if defense.get(c.name) is c.function]
    assert len(shared) == 26


# Every check can fail


@pytest.mark.parametrize(("cls", "names"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_attack_fails_its_check_and_no_other(cls: type[Attack], names: set[str]) -> None:
    report = check_attack(cls())
    assert set(report.failed) == names, [o for o in report.outcomes if o.status == "failed"]
    assert all(o.message for o in report.outcomes if o.status == "failed")


@pytest.mark.parametrize("cls", [Sound, SoundTrained, SoundEnsemble])
def test_what_the_broken_ones_start_from_is_sound(cls: type[Attack]) -> None:
    report = check_attack(cls())
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]


@dataclass(frozen=True)
class StaysBehind(Sound):
    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return {k: v.to("meta") for k, v in super().recover(released, knowledge, rng).items()}


def test_the_device_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator: the CPU plays the other device, and `meta` the fixed one."""
    monkeypatch.setattr(behaviour, "other_device", lambda: torch.device("cpu"))
    report = check_attack(StaysBehind(), only=["device"])
    assert report.failed == ("device",)
    assert "is on meta" in report.outcomes[0].message
    assert check_attack(Sound(), only=["device"]).outcomes[0].status == "passed"


def test_every_check_is_shown_to_fail() -> None:
    shown = set().union(*(names for _, names in BROKEN)) | {"device"}
    elsewhere = {check.name for check in honesty.check.all()}  # test_conformance_dishonest
    assert shown | elsewhere == set(NAMES)


# Access tiers


REACHES: Mapping[str, tuple[Access, Callable[[Knowledge, torch.Generator], object]]] = {
    "features": (Access.UNLABELED, lambda k, rng: k.features(k.base, {})),
    "unlabeled": (Access.UNLABELED, lambda k, rng: k.unlabeled(1, rng)),
    "distil": (Access.UNLABELED, lambda k, rng: k.distil(k.base, k.base, {}, rng)),
    "labeled": (Access.LABELED, lambda k, rng: k.labeled(1, rng)),
    "fine_tune": (Access.LABELED, lambda k, rng: k.fine_tune(k.base, {}, rng)),
}


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(Named("tiny", Tiny("vit")), torch.device("cpu"), Store(tmp_path))


@pytest.mark.parametrize("name", ATTACKS.names())
def test_reaching_past_the_tier_raises(name: str, bench: Workbench) -> None:
    """What the pipeline gives an attack refuses all that its tier has not, and charges nothing."""
    attack = methods.attack(name)
    knowledge = bench.knowledge(attack, Group(victim="first", partners=("second",)))
    rng = torch.Generator().manual_seed(0)
    for what, (tier, reach) in REACHES.items():
        if tier > attack.method.access:
            with pytest.raises(AccessError, match=rf"needs access '{tier.label}'; only"):
                reach(knowledge, rng)
            assert knowledge.budget == type(knowledge.budget)(), what


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        (name, tier)
        for name in ATTACKS.names()
        for tier in Access
        if tier < methods.attack(name).method.access
    ],
)
def test_an_attack_granted_less_than_it_declares_raises(name: str, tier: Access) -> None:
    attack, given = methods.attack(name).method, scene(Tiny("vit"), tier)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(AccessError, match=f"only {tier.label!r} given"):
        attack.refine(attack.recover(given.released, given.knowledge, rng), given.knowledge, rng)


def test_the_tiers_are_all_used() -> None:
    assert {methods.attack(name).method.access for name in ATTACKS.names()} == set(Access)


# What the checks start from


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_release_of_a_scene_is_locked_and_computes_the_expert(architecture: str) -> None:
    from benchmark.conformance.scenes import locked
    from benchmark.conformance.subjects import expert, logits
    from benchmark.evaluation.accuracy import relative_gap

    testbed = Tiny(architecture)  # type: ignore[arg-type]
    release, other = locked(testbed), expert(testbed, "first")
    gap = relative_gap(logits(testbed.architecture, release), logits(testbed.architecture, other))
    assert gap < 1e-5
    for block in testbed.anatomy().attention:
        for part in ("q", "k", "v"):
            mine, theirs = (block.read(state, part) for state in (release, other))
            assert (mine - theirs).norm() > 0.5 * theirs.norm(), part


# Expected failures, and as tests of a third party


@dataclass(frozen=True)
class KnownToRemember(RemembersWhatItKnew):
    expected_failed_checks: ClassVar[Mapping[str, str]] = {"cost": "a cache of ours"}


def test_an_expected_failure_does_not_fail() -> None:
    report = check_attack(KnownToRemember(), only=["cost", "card"])
    assert report.passed
    assert [o.status for o in report.outcomes] == ["passed", "expected failure"]
    assert check_attack(RemembersWhatItKnew(), only=["cost"]).failed == ("cost",)


def test_unknown_check_names_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'access-tier'"):
        check_attack("none", only=["access"])
    with pytest.raises(UsageError, match="--expect: unknown check 'shipped'"):
        check_attack("none", expected_failed_checks={"shipped": "of defenses only"})


def test_as_parametrized_tests() -> None:
    tests = dict(attack_checks(KnownToRemember()))
    assert tuple(tests) == NAMES
    tests["finite"]()
    with pytest.raises(SkipTest, match="a cache of ours"):
        tests["cost"]()
    with pytest.raises(CheckFailed, match="cost: keeps"):
        dict(attack_checks(RemembersWhatItKnew()))["cost"]()
