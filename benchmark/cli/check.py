"""``check``: does a method keep its contract?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmark.cli.output import Json, console, facts, print_json, steps, table
from benchmark.core.errors import UsageError

if TYPE_CHECKING:
    from benchmark.conformance.frame import Checks, Report

Method = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A name, file.py:Class, or a spec of them.")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="CHECK", help="Only this one; repeatable.")
]
Expect = Annotated[
    list[str] | None,
    typer.Option("--expect", metavar="CHECK=REASON", help="It may fail; repeatable."),
]
List = Annotated[bool, typer.Option("--list", help="Print the checks and what each asks.")]

_STYLES = {"failed": "bold red", "unexpected pass": "yellow", "skipped": "dim"}


def register(app: typer.Typer) -> None:
    """Add the command group to ``app``."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    group.command("defense")(defense)
    group.command("attack")(attack)
    group.command("merger")(merger)
    app.add_typer(group, name="check", help="Check a method's contract on tiny models.")


def defense(
    name: Method = None,
    only: Only = None,
    expect: Expect = None,
    list_checks: List = False,
    as_json: Json = False,
) -> None:
    """Check that a defense keeps its contract, on tiny random models, in seconds.

    Exit code 1 if a check fails that was not expected to. A class may declare its own
    expected_failed_checks = {check: reason}.

    [bold]Examples[/bold]

      unmergebench check defense params

      unmergebench check defense 'my_defense.py:MyDefense(strength=2)'

      unmergebench check defense my_defense.py:MyDefense --only equivalence --only pickles

      unmergebench check defense my_defense.py:MyDefense --expect 'bfloat16=needs float32'

      unmergebench check defense --list
    """
    from benchmark.conformance import DEFENSE_CHECKS, check_defense

    _check("defense", DEFENSE_CHECKS, check_defense, name, only, expect, list_checks, as_json)


def attack(
    name: Method = None,
    only: Only = None,
    expect: Expect = None,
    list_checks: List = False,
    as_json: Json = False,
) -> None:
    """Check that an attack keeps its contract and its access tier, on tiny random models.

    Exit code 1 if a check fails that was not expected to. A class may declare its own
    expected_failed_checks = {check: reason}.

    [bold]Examples[/bold]

      unmergebench check attack gauge-align

      unmergebench check attack 'my_attack.py:MyAttack(strength=2)'

      unmergebench check attack my_attack.py:MyAttack --only access-tier --only budget

      unmergebench check attack gauge-align+my_attack.py:MyAttack

      unmergebench check attack --list
    """
    from benchmark.conformance import ATTACK_CHECKS, check_attack

    _check("attack", ATTACK_CHECKS, check_attack, name, only, expect, list_checks, as_json)


def merger(
    name: Method = None,
    only: Only = None,
    expect: Expect = None,
    list_checks: List = False,
    as_json: Json = False,
) -> None:
    """Check that a merger keeps its contract and its access tier, on tiny random models.

    Exit code 1 if a check fails that was not expected to. A class may declare its own
    expected_failed_checks = {check: reason}.

    [bold]Examples[/bold]

      unmergebench check merger ties

      unmergebench check merger 'my_merger.py:MyMerger(density=0.5)'

      unmergebench check merger my_merger.py:MyMerger --only search-space --only left-out

      unmergebench check merger --list
    """
    from benchmark.conformance import MERGER_CHECKS, check_merger

    _check("merger", MERGER_CHECKS, check_merger, name, only, expect, list_checks, as_json)


def _check(
    kind: str,
    checks: Checks[Any],
    run: Callable[..., Report],
    name: str | None,
    only: list[str] | None,
    expect: list[str] | None,
    list_checks: bool,
    as_json: bool,
) -> None:
    """The body of each command."""
    if list_checks:
        _list(checks, as_json)
        return
    if name is None:
        raise UsageError(f"which {kind}? Give a name, or file.py:Class; --list prints the checks")
    expected = _expected(expect or ())
    with steps(1 + len(only or checks.all())) as notify:
        report = run(name, only=only or (), expected_failed_checks=expected, notify=notify)
    _show(report, as_json)


def _list(checks: Checks[Any], as_json: bool) -> None:
    rows = [(check.name, check.doc) for check in checks.all()]
    if as_json:
        print_json([{"check": check, "asks": doc} for check, doc in rows])
    else:
        console().print(facts("", rows))


def _expected(options: list[str] | tuple[()]) -> dict[str, str]:
    """``CHECK=REASON`` options as a mapping."""
    found = {}
    for option in options:
        check, equals, reason = (part.strip() for part in option.partition("="))
        if not (equals and check and reason):
            raise UsageError(f"--expect {option!r}: write CHECK=REASON")
        found[check] = reason
    return found


def _show(report: Report, as_json: bool) -> None:
    """The report as JSON or as a table; raises typer.Exit(1) if a check failed."""
    if as_json:
        print_json(report.to_dict())
    else:
        rows = [(o.check, o.status, o.message, f"{o.seconds:.2f}") for o in report.outcomes]
        made = table(f"{report.kind} {report.spec}", ("check", "status", "remark", "seconds"), rows)
        for row, outcome in zip(made.rows, report.outcomes, strict=True):
            row.style = _STYLES.get(outcome.status)
        console().print(made)
        console().print(f"{report.spec}: {report.summary}", markup=False)
    if not report.passed:
        raise typer.Exit(1)
