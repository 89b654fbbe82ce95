"""The checks of any method's definition: class, card, parameters. They run nothing of it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from benchmark.api.contracts import Card
from benchmark.api.specs import build, canonical, field_type, parameters, parse
from benchmark.conformance import guards
from benchmark.conformance.case import AnyCase
from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.core.errors import UsageError

#: Part of the list of every kind of method.
check: Checks[AnyCase] = Checks("method")


@check
def frozen_dataclass(case: AnyCase) -> None:
    """The class is a frozen dataclass that compares by its fields, each of a type specs can set."""
    for part in case.parts:
        cls = type(part)
        decorated = vars(cls).get("__dataclass_params__")
        if decorated is None or not decorated.frozen or not decorated.eq:
            raise CheckFailed(f"decorate {cls.__name__} with @dataclass(frozen=True)")
        for field in _fields(part):
            try:
                field_type(cls, field.name)
            except Exception as error:
                raise CheckFailed(f"cannot read the type of {field.name}: {error}") from None


@check
def card(case: AnyCase) -> None:
    """The card says what it does and where it is from; a method names its paper or is `ours`."""
    for part in case.parts:
        found = getattr(part, "card", None)
        if not isinstance(found, Card):
            raise CheckFailed(f"{type(part).__name__} needs card: ClassVar[Card] = Card(...)")
        if not found.summary.strip() or "\n" in found.summary:
            raise CheckFailed("card.summary must be one line")
        if found.role == "method" and found.fidelity != "ours" and not found.paper:
            raise CheckFailed(
                f'card.fidelity is {found.fidelity!r}: name card.paper, or say "ours"'
            )
        if found.fidelity == "reconstruction" and not found.notes:
            raise CheckFailed("a reconstruction says in card.notes where the source is silent")


@check
def parameters_round_trip(case: AnyCase) -> None:
    """The spec string of the method, and of each other choice it offers, builds an equal method."""
    for part in case.parts:
        for variant in _variants(part):
            name = type(part).__name__
            spec = canonical(name, variant)
            try:
                again = build(type(part), *parse(spec))
            except UsageError as error:
                raise CheckFailed(f"its own spec {spec} is refused: {error}") from None
            if again != variant:
                raise CheckFailed(f"spec {spec} builds {again}, not {variant}")


@check
def parameters_refused(case: AnyCase) -> None:
    """Unknown parameters, and values of no sensible type, are refused."""
    for part in case.parts:
        cls, unknown = type(part), "no_such_parameter"
        wrong = {field: object() for field in parameters(part)}
        for field, value in {unknown: 1, **wrong}.items():
            try:
                build(cls, cls.__name__, {**parameters(part), field: value})
            except UsageError:
                continue
            what = "a misspelt one" if field == unknown else "any object at all"
            raise CheckFailed(f"parameter {field} accepts {what}; give it a type")
        try:
            cls(**{**parameters(part), unknown: 1})
        except TypeError:
            continue
        raise CheckFailed("its constructor swallows unknown parameters")


@check
def construction(case: AnyCase) -> None:
    """Building it draws nothing, sets nothing, writes nothing and starts nothing."""
    for part in case.parts:
        build(type(part), "warm-up", parameters(part))  # its first imports are no side effect
        guards.reseed(20250819)  # a seed that the warm-up may have set would hide a second time
        states, settings = guards.random_states(), guards.settings()
        with guards.outside() as done:
            build(type(part), "check", parameters(part))
        if done:
            raise CheckFailed(f"building it {done[0]}")
        settings_kept(settings, "building it")
        random_states_kept(states, "building it")


def settings_kept(before: dict[str, object], what: str) -> None:
    """Fail if a setting of the process is another than ``before``."""
    for name, value in guards.settings().items():
        if value != before[name]:
            shown = "" if isinstance(value, dict) else f" from {before[name]} to {value}"
            raise CheckFailed(f"{what} changes the {name}{shown}")


def random_states_kept(before: dict[str, object], what: str) -> None:
    """Fail if a global generator is in another state than ``before``."""
    for name, value in guards.random_states().items():
        if value != before[name]:
            raise CheckFailed(f"{what} moves the global generator of {name}; draw from rng only")


def _fields(part: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Its hyper-parameters."""
    return tuple(field for field in dataclasses.fields(part) if field.init)


def _variants(part: Any) -> Iterator[Any]:
    """The method, and with each field in turn at each of its other choices, if it allows that."""
    yield part
    for field in _fields(part):
        hint = field_type(type(part), field.name)
        choices = [True, False] if hint is bool else typing.get_args(hint)
        for choice in choices:
            if isinstance(choice, (str, bool)):
                try:
                    yield type(part)(**{**parameters(part), field.name: choice})
                except (TypeError, ValueError):
                    continue
