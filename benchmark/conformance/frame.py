"""What every kind of check shares: outcomes, expected failures, the report.

A check is a function of one subject. Its docstring is what users read. It returns a remark or None,
raises :class:`CheckFailed` with the reason, or :class:`unittest.SkipTest` where it cannot be made.
Any other exception is a failure too.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from unittest import SkipTest

from benchmark.api.specs import did_you_mean
from benchmark.conformance.guards import restored
from benchmark.core.errors import UsageError

S = TypeVar("S")

Status = Literal["passed", "failed", "skipped", "expected failure", "unexpected pass"]


class CheckFailed(AssertionError):
    """The subject breaks the contract; the message says how."""


@dataclass(frozen=True)
class Check(Generic[S]):
    """A named check of subjects of type S. ``binds``: no reason excuses a failure."""

    name: str
    function: Callable[[S], str | None]
    binds: bool = False

    @property
    def doc(self) -> str:
        """The one line that users read."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


class Checks(Generic[S]):
    """A list of checks, filled by its decorator; names are those of the functions."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._checks: dict[str, Check[S]] = {}

    def __call__(
        self, function: Callable[[S], str | None], *, binds: bool = False
    ) -> Callable[[S], str | None]:
        name = function.__name__.replace("_", "-")
        self._checks[name] = Check(name, function, binds)
        return function

    def binding(self, function: Callable[[S], str | None]) -> Callable[[S], str | None]:
        """The decorator for a check that no reason excuses."""
        return self(function, binds=True)

    def include(self, shared: Checks[Any]) -> None:
        """Add the checks of another list after those there are."""
        for check in shared.all():
            self(check.function, binds=check.binds)

    def all(self) -> tuple[Check[S], ...]:
        """In the order of definition."""
        return tuple(self._checks.values())

    def named(self, names: Iterable[str], where: str) -> tuple[Check[S], ...]:
        """Those called ``names``, in the order of definition.

        Raises:
            UsageError: no such check; ``where`` says who asked for it.
        """
        names = set(names)
        for name in sorted(names - self._checks.keys()):
            raise UsageError(f"{where}: unknown check {name!r}{did_you_mean(name, self._checks)}")
        return tuple(check for check in self.all() if check.name in names)

    def excusable(self, names: Iterable[str], where: str) -> None:
        """Raise UsageError unless all of ``names`` are checks that may be expected to fail."""
        for check in self.named(names, where):
            if check.binds:
                raise UsageError(f"{where}: nothing excuses {check.name!r}; it binds every method")


@dataclass(frozen=True)
class Outcome:
    """What one check found. ``message``: why it failed or was skipped, or a remark."""

    check: str
    status: Status
    message: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """All outcomes of one method."""

    kind: str
    spec: str
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed that was not expected to."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed unexpectedly."""
        return tuple(o.check for o in self.outcomes if o.status == "failed")

    @property
    def excused(self) -> tuple[str, ...]:
        """Names of the checks that failed as they were expected to."""
        return tuple(o.check for o in self.outcomes if o.status == "expected failure")

    @property
    def summary(self) -> str:
        """``20 passed, 1 skipped``."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "kind": self.kind,
            "spec": self.spec,
            "passed": self.passed,
            "checks": [vars(outcome) for outcome in self.outcomes],
        }


def execute(check: Check[S], subject: S, expected: Mapping[str, str]) -> Outcome:
    """One check, with what it did to the process undone. ``expected``: check → why it may fail."""
    start = time.perf_counter()
    status: Status
    reason = expected.get(check.name)
    try:
        with restored():
            message = check.function(subject) or ""
        status = "passed"
        if reason is not None:
            status, message = "unexpected pass", f"no longer fails; it was expected to: {reason}"
    except SkipTest as skip:
        status, message = "skipped", str(skip)
    except Exception as error:
        status, message = "failed", describe(error)
        if reason is not None:
            status, message = "expected failure", f"{reason} ({message})"
    return Outcome(check.name, status, message, time.perf_counter() - start)


def run(
    kind: str,
    spec: str,
    checks: Sequence[Check[S]],
    subject: S,
    expected: Mapping[str, str],
    notify: Callable[[str], None] = lambda name: None,
) -> Report:
    """Every check in turn; ``notify(name)`` is called before each."""
    outcomes = []
    for check in checks:
        notify(check.name)
        outcomes.append(execute(check, subject, expected))
    return Report(kind, spec, tuple(outcomes))


def as_test(check: Check[S], subject: S, expected: Mapping[str, str]) -> Callable[[], None]:
    """The check as a test function for pytest or unittest: raises if it fails, or skips."""

    def test() -> None:
        outcome = execute(check, subject, expected)
        if outcome.status == "failed":
            raise CheckFailed(f"{check.name}: {outcome.message}")
        if outcome.status in ("skipped", "expected failure"):
            raise SkipTest(f"{outcome.status}: {outcome.message}")

    return test


def describe(error: BaseException) -> str:
    """One line: the message of a failed check, of other exceptions their type too."""
    text = " ".join(str(error).split())
    if isinstance(error, CheckFailed):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
