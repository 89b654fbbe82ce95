"""The conformance suite for mergers: every built-in passes, and every check can fail."""

from __future__ import annotations

import sys
from unittest import SkipTest

import pytest
import torch
from broken_mergers import (
    BROKEN,
    Sound,
    SoundDraws,
    SoundPerTask,
    SoundWithData,
    StepsForFree,
)
from conftest import Cli, some_slow

from benchmark.api.contracts import Merger, Setting
from benchmark.api.methods import MERGERS
from benchmark.conformance import (
    ATTACK_CHECKS,
    DEFENSE_CHECKS,
    MERGER_CHECKS,
    CheckFailed,
    behaviour,
    check_merger,
    merger_checks,
)
from benchmark.core.errors import MethodError, UsageError

NAMES = tuple(check.name for check in MERGER_CHECKS.all())

#: The same mergers with less data and training.
QUICK = {
    "adamerging": "adamerging(per_task=2,steps=1)",
    "fisher": "fisher(per_task=2)",
    "neulig": "neulig(steps=2)",
    "prodistill": "prodistill(per_task=2,steps=1)",
}
VARIANTS = ("ties(scope=tensor)", "task-arithmetic(per=layer)", "fisher(per_task=2,labels=sampled)")
OWN = [name for name in MERGERS.names() if not name.startswith("mergekit/")]
BUILT_IN = [*(QUICK.get(n, n) for n in OWN), *VARIANTS]
THEIRS = sorted(set(MERGERS.names()) - {*OWN, "mergekit/passthrough"})


@pytest.mark.parametrize(
    "spec", some_slow(BUILT_IN, {*BUILT_IN} - {"task-arithmetic", "dare", "emr"})
)
def test_every_built_in_keeps_its_contract(spec: str) -> None:
    report = check_merger(spec)
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]
    assert [o.check for o in report.outcomes] == list(NAMES)


@pytest.mark.parametrize("name", some_slow(THEIRS, {*THEIRS} - {"mergekit/dare-ties"}))
def test_so_does_mergekit(name: str) -> None:
    pytest.importorskip("mergekit")
    report = check_merger(name)
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]


def test_names_and_docstrings() -> None:
    assert 15 <= len(NAMES) == len(set(NAMES))
    for check in MERGER_CHECKS.all():
        assert check.doc.endswith("."), check.name
        assert len(check.doc) <= 110, check.name


def test_what_others_must_do_too_is_checked_by_the_same_code() -> None:
    attack, defense = (
        {check.function for check in checks.all()} for checks in (ATTACK_CHECKS, DEFENSE_CHECKS)
    )
    mergers = {check.function for check in MERGER_CHECKS.all()}
    assert len(mergers & attack & defense) == 26
    assert {f.__name__ for f in (mergers & attack) - defense} == {"access_tier", "budget"}


@pytest.mark.parametrize(("cls", "names"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_merger_fails_its_check_and_no_other(cls: type[Merger], names: set[str]) -> None:
    report = check_merger(cls())
    assert set(report.failed) == names, [o for o in report.outcomes if o.status == "failed"]
    assert all(o.message for o in report.outcomes if o.status == "failed")


@pytest.mark.parametrize("cls", [Sound, SoundDraws, SoundPerTask, SoundWithData])
def test_what_the_broken_ones_start_from_is_sound(cls: type[Merger]) -> None:
    report = check_merger(cls())
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]


def test_every_check_of_mergers_alone_is_shown_to_fail() -> None:
    shared = {check.name for check in DEFENSE_CHECKS.all()}
    assert set(NAMES) - shared <= set().union(*(names for _, names in BROKEN))


def test_the_device_check_takes_models_made_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator: the CPU plays the other device."""
    monkeypatch.setattr(behaviour, "other_device", lambda: torch.device("cpu"))
    for spec in ("ensemble", "emr"):
        assert check_merger(spec, only=["device"]).outcomes[0].status == "passed"


def test_a_merger_of_one_model_cannot_be_checked() -> None:
    class One(Sound):
        def search_space(self, members: int) -> list[Setting]:
            raise MethodError("one model only")

    with pytest.raises(UsageError, match="One merges no two models: one model only"):
        check_merger(One())


def test_what_is_not_installed_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(UsageError, match=r"^mergekit is not installed: pip"):
        check_merger("mergekit/ties")


def test_as_parametrized_tests() -> None:
    tests = dict(merger_checks(StepsForFree()))
    assert tuple(tests) == NAMES
    tests["finite"]()
    with pytest.raises(CheckFailed, match="budget: takes 2 optimizer steps"):
        tests["budget"]()
    if not torch.cuda.is_available():
        with pytest.raises(SkipTest, match="no CUDA device"):
            tests["device"]()


def test_the_command(cli: Cli) -> None:
    code, printed = cli("check", "merger", "slerp", "--only", "search-space", "--json")
    assert code == 0
    assert '"kind": "merger"' in printed
    assert "refuses three" in printed
    code, said = cli("check", "merger", "slrep")
    assert code == 2
    assert "did you mean 'slerp'" in said
