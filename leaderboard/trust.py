"""Names from strangers. A spec may name a Python file, and to resolve it is to run that file.

Specs that come from an entry or a recipe are resolved only if every part is a method of
UnmergeBench's own distribution, or if the user named the same spec; then a defense is run in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from benchmark.api import methods
from benchmark.api.contracts import Attack, Defense, Merger, Testbed
from benchmark.api.methods import Named
from benchmark.api.registry import Registry
from benchmark.core.errors import UsageError
from benchmark.pipeline import apart


class Untrusted(UsageError):
    """A spec that is somebody's own code."""


def defense(spec: str, trusted: Collection[str] = ()) -> Named[Defense]:
    """The defense, if it ships with UnmergeBench or ``spec`` is among ``trusted``: that of somebody
    else in a process of its own.

    Raises:
        Untrusted: it is neither.
        UsageError: an unknown parameter, or a value out of range.
    """
    _admit(methods.DEFENSES, spec, trusted)
    return apart.defense(spec)


def attack(spec: str) -> Named[Attack]:
    """An attack that ships with UnmergeBench. Raises as :func:`defense`."""
    _admit(methods.ATTACKS, spec)
    return methods.attack(spec)


def merger(spec: str) -> Named[Merger]:
    """A merger that ships with UnmergeBench. Raises as :func:`defense`."""
    _admit(methods.MERGERS, spec)
    return methods.merger(spec)


def testbed(spec: str) -> Named[Testbed]:
    """A testbed that ships with UnmergeBench. Raises as :func:`defense`."""
    _admit(methods.TESTBEDS, spec)
    return methods.testbed(spec)


testbed.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks


def _admit(registry: Registry[Any], spec: str, trusted: Collection[str] = ()) -> None:
    if spec not in trusted and not registry.ships(spec):
        raise Untrusted(
            f"{registry.singular} {spec[:200]!r} does not ship with UnmergeBench; it was not run"
        )
