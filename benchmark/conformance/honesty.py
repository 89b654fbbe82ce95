"""The checks of what a method may do besides its work: nothing that others could not see.

Nothing but side effects can be excused. The checks find what is done in the open, on models of a
size that tells a method that it is being checked; the rest is found elsewhere. Anybody else's
defense makes its release in a process that holds no evaluator, the pipeline compares what it handed
over before and after every method, and `verify` runs cells again.
"""

from __future__ import annotations

from benchmark.conformance import guards
from benchmark.conformance.case import AnyCase
from benchmark.conformance.frame import CheckFailed, Checks

#: Part of the list of every kind of method.
check: Checks[AnyCase] = Checks("method")


@check.binding
def same_method(case: AnyCase) -> None:
    """Calls leave its parameters, its card and the rest of its definition as they were."""
    _ = case.seen
    for name, value in case.defined().items():
        if value != case.definitions[name]:
            raise CheckFailed(f"{name} is another after a call; keep the dataclass frozen")


@check.binding
def patches_nothing(case: AnyCase) -> None:
    """Import and calls replace no function, class or constant of the benchmark or of torch."""
    _ = case.seen
    namespaces = case.world.namespaces
    if changed := namespaces.changed():
        namespaces.restore()
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckFailed(f"replaces {changed[0]}{more}, which others run")


@check.binding
def nothing_left_running(case: AnyCase) -> None:
    """No thread, timer, hook or mode that it started is there when a call has returned."""
    _ = case.seen
    for name, found in guards.running().items():
        if any(one not in case.world.running[name] for one in found):
            raise CheckFailed(f"leaves {name} behind: a call must be over when it returns")


@check.binding
def asks_nothing(case: AnyCase) -> None:
    """Its own code asks neither clock, environment, process and host nor who is calling it."""
    if found := case.seen.questions:
        raise CheckFailed(f"asks {found[0]}; what it is given is all that may decide")


@check
def side_effects(case: AnyCase) -> None:
    """Calls write no file, delete none, connect nowhere and start no process."""
    if done := case.seen.effects:
        raise CheckFailed(f"a call {done[0]}")
