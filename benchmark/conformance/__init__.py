"""Does a method keep its contract? Checks for anybody's class, on tiny models, without downloads.

from benchmark.conformance import check_defense, defense_checks

assert check_defense("my_defense.py:MyDefense").passed

@pytest.mark.parametrize(("name", "check"), defense_checks("my_defense.py:MyDefense"))
def test_contract(name, check):
    check()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from benchmark import methods
from benchmark.conformance import frame
from benchmark.conformance.defenses import check as DEFENSE_CHECKS
from benchmark.conformance.frame import CheckFailed, Outcome, Report
from benchmark.conformance.subjects import DefenseCase, warm_up
from benchmark.contracts import Defense
from benchmark.methods import Named

__all__ = [
    "DEFENSE_CHECKS",
    "CheckFailed",
    "Outcome",
    "Report",
    "check_defense",
    "defense_checks",
]


def check_defense(
    method: str | Defense,
    *,
    only: Collection[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
    notify: Callable[[str], None] = lambda name: None,
) -> Report:
    """Check a defense, given as a spec (``name``, ``file.py:Class``, ``a+b``) or an instance.

    Args:
        only: names of checks; all if empty.
        expected_failed_checks: check → why it may fail, added to what the class declares.
        notify: called with the name of each check before it runs.

    Raises:
        UsageError: no such method, or no check of a name in ``only`` or the expected failures.
    """
    notify("loading tiny models")
    case, expected = _defense(method, expected_failed_checks)
    chosen = DEFENSE_CHECKS.named(only, "--only") if only else DEFENSE_CHECKS.all()
    warm_up()  # so that no check is charged with importing an architecture
    return frame.run("defense", case.spec, chosen, case, expected, notify)


def defense_checks(
    method: str | Defense, *, expected_failed_checks: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, test function) of every check, for ``pytest.mark.parametrize``.

    A test function raises :class:`CheckFailed`, or ``unittest.SkipTest`` (also for an expected
    failure). Raises as :func:`check_defense`.
    """
    case, expected = _defense(method, expected_failed_checks)
    for check in DEFENSE_CHECKS.all():
        yield check.name, frame.as_test(check, case, expected)


def _defense(
    method: str | Defense, expected: Mapping[str, str] | None
) -> tuple[DefenseCase, dict[str, str]]:
    named = (
        methods.defense(method) if isinstance(method, str) else Named(type(method).__name__, method)
    )
    case = DefenseCase(named)
    merged: dict[str, str] = {}
    for part in case.parts:
        DEFENSE_CHECKS.named(
            part.expected_failed_checks, f"{type(part).__name__}.expected_failed_checks"
        )
        merged |= part.expected_failed_checks
    DEFENSE_CHECKS.named(expected or (), "--expect")
    return case, {**merged, **(expected or {})}
