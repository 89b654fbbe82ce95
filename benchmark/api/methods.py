"""The four registries, and spec strings → methods, composites (``a+b``) included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from benchmark.api.composition import chain_attacks, chain_defenses
from benchmark.api.contracts import Attack, Defense, Merger, Testbed
from benchmark.api.registry import Registry
from benchmark.api.specs import build, canonical, parse, split_composite
from benchmark.core.errors import UsageError

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "MERGERS",
    "TESTBEDS",
    "Named",
    "attack",
    "defense",
    "merger",
    "testbed",
]

T = TypeVar("T")

DEFENSES: Registry[Defense] = Registry("defenses", Defense)
ATTACKS: Registry[Attack] = Registry("attacks", Attack)
MERGERS: Registry[Merger] = Registry("mergers", Merger)
TESTBEDS: Registry[Testbed] = Registry("testbeds", Testbed)
#: Suffix of a file that declares a testbed → the class that reads it, which takes its path.
TESTBED_FILES: Registry[Testbed] = Registry("testbed_files", Testbed)


@dataclass(frozen=True)
class Named(Generic[T]):
    """A method and the canonical spec that builds it (parameters off their default only)."""

    spec: str
    method: T


def defense(spec: str) -> Named[Defense]:
    """The defense behind a spec; the parts of ``a+b`` protect in turn.

    Raises:
        UsageError: unknown name or parameter, a value of the wrong type or out of range.
    """
    return _composite(DEFENSES, spec, chain_defenses)


def attack(spec: str) -> Named[Attack]:
    """The attack behind a spec; the parts of ``a+b`` attack in turn. Raises as :func:`defense`."""
    return _composite(ATTACKS, spec, chain_attacks)


def merger(spec: str) -> Named[Merger]:
    """The merger behind a spec. Raises as :func:`defense`, also for ``a+b``."""
    return _single(MERGERS, spec)


def testbed(spec: str) -> Named[Testbed]:
    """The testbed behind a spec, or declared in a TOML file. Raises as :func:`defense`, also for
    ``a+b``.
    """
    suffix = Path(spec).suffix.removeprefix(".")
    if suffix in TESTBED_FILES.entries:
        declared = build(TESTBED_FILES.get(suffix), suffix, {"file": spec})
        # Its own name: where the file lies says nothing about what it holds.
        return Named(declared.name, declared)
    return _single(TESTBEDS, spec)


testbed.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks


def _one(registry: Registry[T], spec: str) -> Named[T]:
    method = registry.create(spec)
    return Named(canonical(parse(spec)[0], method), method)


def _single(registry: Registry[T], spec: str) -> Named[T]:
    if len(split_composite(spec)) > 1:
        raise UsageError(f"{registry.kind} do not compose: give {spec!r} as separate names")
    return _one(registry, spec)


def _composite(registry: Registry[T], spec: str, chain: Callable[[tuple[T, ...]], T]) -> Named[T]:
    parts = [_one(registry, part) for part in split_composite(spec)]
    if len(parts) == 1:
        return parts[0]
    return Named("+".join(p.spec for p in parts), chain(tuple(p.method for p in parts)))
