"""The conformance suite: every built-in passes, and every check can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from unittest import SkipTest

import pytest
import torch
from broken import (
    BROKEN,
    EditsTheEnvironment,
    Hoards,
    MovesNumpy,
    SeedsWhenBuilt,
    Sound,
    SwitchesGradientsOff,
)
from broken_dishonest import DISHONEST
from conftest import some_slow

from benchmark.api.contracts import Defense, Victim
from benchmark.api.methods import DEFENSES
from benchmark.conformance import (
    DEFENSE_CHECKS,
    CheckFailed,
    behaviour,
    check_defense,
    defense_checks,
    guards,
)
from benchmark.conformance.measure import Watch
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State

NAMES = tuple(check.name for check in DEFENSE_CHECKS.all())


@pytest.mark.parametrize(
    "spec",
    some_slow([*DEFENSES.names(), "params+mergelock"], {*DEFENSES.names()} - {"none", "params"}),
)
def test_every_built_in_keeps_its_contract(spec: str) -> None:
    report = check_defense(spec)
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]
    assert [o.check for o in report.outcomes] == list(NAMES)


def test_names_and_docstrings() -> None:
    assert 15 <= len(NAMES) == len(set(NAMES))
    for check in DEFENSE_CHECKS.all():
        assert check.doc.endswith("."), check.name
        assert len(check.doc) <= 110, check.name


# Every check can fail


@pytest.mark.parametrize(("cls", "names"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_defense_fails_its_check_and_no_other(cls: type[Defense], names: set[str]) -> None:
    report = check_defense(cls())
    assert set(report.failed) == names, [o for o in report.outcomes if o.status == "failed"]
    assert all(o.message for o in report.outcomes if o.status == "failed")


@dataclass(frozen=True)
class StaysBehind(Sound):
    """Makes its tensors on one fixed device, whatever the victim's."""

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {k: v.to("meta") for k, v in super().protect(victim, rng).items()}


def test_the_device_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator: the CPU plays the other device, and `meta` the fixed one."""
    monkeypatch.setattr(behaviour, "other_device", lambda: torch.device("cpu"))
    report = check_defense(StaysBehind(), only=["device"])
    assert report.failed == ("device",)
    assert "is on meta" in report.outcomes[0].message
    assert check_defense(Sound(), only=["device"]).outcomes[0].status == "passed"


@dataclass(frozen=True)
class OnTheCpu(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {k: v + torch.zeros(v.shape).to("cpu") for k, v in victim.expert.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_check_finds_a_defense_that_stays_on_the_cpu() -> None:
    assert check_defense(OnTheCpu(), only=["device"]).failed == ("device",)


def test_every_check_is_shown_to_fail() -> None:
    shown = set().union(*(names for _, names in [*BROKEN, *DISHONEST])) | {"device"}
    assert shown == set(NAMES)


def test_the_device_check_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "other_device", lambda: None)
    (outcome,) = check_defense("none", only=["device"]).outcomes
    assert (outcome.status, outcome.message) == ("skipped", "no CUDA device on this machine")


@dataclass(frozen=True)
class Refuses(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        if victim.base[next(iter(victim.base))].dtype != torch.float32:
            raise MethodError("needs float32 weights")
        if "input_ids" not in victim.task.train.inputs:
            raise MethodError("needs text")
        return super().protect(victim, rng)


def test_a_refusal_is_no_failure() -> None:
    report = check_defense(Refuses())
    assert report.passed
    messages = {o.check: o.message for o in report.outcomes}
    assert messages["architectures"] == "refuses vit (needs text), bert, llama"
    assert messages["bfloat16"] == "refuses: needs float32 weights"


@dataclass(frozen=True)
class RefusesAll(Sound):
    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        raise MethodError("not today")


def test_a_defense_that_refuses_everything_fails() -> None:
    report = check_defense(RefusesAll())
    assert "finite" in report.failed
    assert "refuses every architecture" in next(
        o.message for o in report.outcomes if o.check == "finite"
    )


# Expected failures


@dataclass(frozen=True)
class KnownToHoard(Hoards):
    expected_failed_checks: ClassVar[Mapping[str, str]] = {"cost": "a cache of ours"}


def test_an_expected_failure_does_not_fail() -> None:
    report = check_defense(KnownToHoard())
    assert report.passed
    outcome = next(o for o in report.outcomes if o.check == "cost")
    assert outcome.status == "expected failure"
    assert outcome.message.startswith("a cache of ours (keeps ")
    assert check_defense(Hoards(), expected_failed_checks={"cost": "known"}).passed


def test_an_expected_failure_that_passes_is_told() -> None:
    report = check_defense("none", expected_failed_checks={"finite": "long ago"})
    assert report.passed
    outcome = next(o for o in report.outcomes if o.check == "finite")
    assert outcome.status == "unexpected pass"
    assert "long ago" in outcome.message


@dataclass(frozen=True)
class ExpectsNonsense(Sound):
    expected_failed_checks: ClassVar[Mapping[str, str]] = {"finit": "?"}


def test_unknown_check_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"ExpectsNonsense.*did you mean 'finite'"):
        check_defense(ExpectsNonsense())
    with pytest.raises(UsageError, match="did you mean 'pickles'"):
        check_defense("none", expected_failed_checks={"pickle": "?"})
    with pytest.raises(UsageError, match="did you mean 'cost'"):
        check_defense("none", only=["costs"])


# As tests of a third party


def test_as_parametrized_tests() -> None:
    tests = dict(defense_checks(Hoards(), expected_failed_checks={"seeded": "?"}))
    assert tuple(tests) == NAMES
    tests["finite"]()
    with pytest.raises(CheckFailed, match="cost: keeps"):
        tests["cost"]()
    expected = dict(defense_checks(KnownToHoard()))
    with pytest.raises(SkipTest, match="a cache of ours"):
        expected["cost"]()


# What the checks rest on


def test_checks_leave_the_process_as_it_was() -> None:
    broken = SwitchesGradientsOff(), EditsTheEnvironment(), MovesNumpy(), SeedsWhenBuilt()
    check_defense(Sound(), only=["card"])  # a first import of torch's compiler sets a variable
    before, settings = guards.random_states(), guards.settings()
    for method in broken:
        check_defense(method)
    assert guards.random_states() == before
    assert guards.settings() == settings


def test_memory_is_counted_once_per_storage_and_forgotten_when_freed() -> None:
    given = torch.zeros(1000)
    with Watch() as watch:
        kept = given + 1  # 4000 bytes
        view = kept[:10] * 2  # 40 bytes
        del kept
        other = given.view(10, 100).T
    assert (watch.peak, watch.live) == (4040, 40)
    del view, other
    assert watch.live == 0
    assert not watch.draws
