"""Does a method keep its contract? Checks for anybody's class, on tiny models, without downloads.

from benchmark.conformance import check_attack, check_defense, check_merger, defense_checks

assert check_defense("my_defense.py:MyDefense").passed
assert check_attack("my_attack.py:MyAttack").passed
assert check_merger("my_merger.py:MyMerger").passed

@pytest.mark.parametrize(("name", "check"), defense_checks("my_defense.py:MyDefense"))
def test_contract(name, check):
    check()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

from benchmark.api import methods
from benchmark.api.contracts import Attack, Defense, Merger
from benchmark.api.methods import Named
from benchmark.conformance import frame
from benchmark.conformance.attacks import check as ATTACK_CHECKS
from benchmark.conformance.case import AnyCase, World, warm_up
from benchmark.conformance.defenses import check as DEFENSE_CHECKS
from benchmark.conformance.frame import CheckFailed, Checks, Outcome, Report
from benchmark.conformance.mergers import check as MERGER_CHECKS
from benchmark.conformance.merges import MergeCase
from benchmark.conformance.scenes import AttackCase
from benchmark.conformance.subjects import DefenseCase
from benchmark.core.errors import MethodError, UsageError

__all__ = [
    "ATTACK_CHECKS",
    "DEFENSE_CHECKS",
    "MERGER_CHECKS",
    "CheckFailed",
    "Outcome",
    "Report",
    "attack_checks",
    "check_attack",
    "check_defense",
    "check_merger",
    "defense_checks",
    "merger_checks",
]

Notify = Callable[[str], None]
Tests = Iterator[tuple[str, Callable[[], None]]]
C = TypeVar("C", bound=AnyCase)
M = TypeVar("M", Defense, Attack, Merger)


def _silent(name: str) -> None:
    """Hears nothing."""


def check_defense(
    method: str | Defense,
    *,
    only: Collection[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
    notify: Notify = _silent,
) -> Report:
    """Check a defense, given as a spec (``name``, ``file.py:Class``, ``a+b``) or an instance.

    Args:
        only: names of checks; all if empty.
        expected_failed_checks: check → why it may fail, added to what the class declares.
        notify: called with the name of each check before it runs.

    Raises:
        UsageError: no such method, no check of a name in ``only`` or the expected failures, or one
            among the latter that nothing excuses.
    """
    return _report(DEFENSE_CHECKS, _defense(method), only, expected_failed_checks, notify)


def check_attack(
    method: str | Attack,
    *,
    only: Collection[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
    notify: Notify = _silent,
) -> Report:
    """Check an attack. Arguments and errors as of :func:`check_defense`."""
    return _report(ATTACK_CHECKS, _attack(method), only, expected_failed_checks, notify)


def check_merger(
    method: str | Merger,
    *,
    only: Collection[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
    notify: Notify = _silent,
) -> Report:
    """Check a merger. Arguments and errors as of :func:`check_defense`.

    Raises:
        UsageError: also if it refuses to merge two models.
    """
    return _report(MERGER_CHECKS, _merger(method), only, expected_failed_checks, notify)


def defense_checks(
    method: str | Defense, *, expected_failed_checks: Mapping[str, str] | None = None
) -> Tests:
    """(name, test function) of every check, for ``pytest.mark.parametrize``.

    A test function raises :class:`CheckFailed`, or ``unittest.SkipTest`` (also for an expected
    failure). Raises as :func:`check_defense`.
    """
    return _tests(DEFENSE_CHECKS, _defense(method), expected_failed_checks)


def attack_checks(
    method: str | Attack, *, expected_failed_checks: Mapping[str, str] | None = None
) -> Tests:
    """As :func:`defense_checks`, for an attack."""
    return _tests(ATTACK_CHECKS, _attack(method), expected_failed_checks)


def merger_checks(
    method: str | Merger, *, expected_failed_checks: Mapping[str, str] | None = None
) -> Tests:
    """As :func:`defense_checks`, for a merger."""
    return _tests(MERGER_CHECKS, _merger(method), expected_failed_checks)


def _named(method: str | M, resolve: Callable[[str], Named[M]]) -> Named[M]:
    return resolve(method) if isinstance(method, str) else Named(type(method).__name__, method)


def _defense(method: str | Defense) -> DefenseCase:
    world = World()  # before the method's code is imported
    return DefenseCase(_named(method, methods.defense), world)


def _attack(method: str | Attack) -> AttackCase:
    world = World()
    return AttackCase(_named(method, methods.attack), world)


def _merger(method: str | Merger) -> MergeCase:
    world = World()
    named = _named(method, methods.merger)
    try:
        named.method.search_space(2)
    except UsageError:
        raise  # something it needs is not installed
    except MethodError as refusal:
        raise UsageError(f"{named.spec} merges no two models: {refusal}") from None
    except Exception:
        pass  # the check `search-space` tells
    return MergeCase(named, world)


def _report(
    checks: Checks[C],
    case: C,
    only: Collection[str],
    expected: Mapping[str, str] | None,
    notify: Notify,
) -> Report:
    expect = _expected(checks, case, expected)
    chosen = checks.named(only, "--only") if only else checks.all()
    notify("loading tiny models")
    warm_up(case)
    try:
        return frame.run(checks.kind, case.spec, chosen, case, expect, notify)
    finally:
        case.world.namespaces.restore()  # whoever calls next runs what ships


def _tests(checks: Checks[C], case: C, expected: Mapping[str, str] | None) -> Tests:
    expect = _expected(checks, case, expected)
    for check in checks.all():
        yield check.name, frame.as_test(check, case, expect)


def _expected(checks: Checks[C], case: AnyCase, given: Mapping[str, str] | None) -> dict[str, str]:
    """What may fail, and why: as the class and its parts declare, and as the caller says."""
    merged: dict[str, str] = {}
    for part in case.parts:
        declared = f"{type(part).__name__}.expected_failed_checks"
        checks.excusable(part.expected_failed_checks, declared)
        merged |= part.expected_failed_checks
    checks.excusable(given or (), "--expect")
    return {**merged, **(given or {})}
