"""The arrows of docs/architecture.md: nothing lower imports anything higher, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: From the ground up. ``defenses`` and ``attacks`` stand side by side on the whole of benchmark's
#: lower half; who may use what is below.
LAYERS = (
    "core",
    "io",
    "anatomy",
    "api",
    "learn",
    "testbeds",
    "merging",
    "evaluation",
    "pipeline",
    "conformance",
    "reporting",
    "cli",
)


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("benchmark", "defenses", "attacks", "leaderboard")
        for path in (ROOT / package).rglob("*.py")
    }


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """What a module imports of ours: at the top, in a function, or for types only."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} is a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        for name in names:
            if name in MODULES:
                yield name, node.lineno  # type: ignore[attr-defined]


def layer(module: str) -> str:
    """``pipeline`` for ``benchmark.pipeline.run``, ``defenses`` for ``defenses.params``."""
    package, *rest = module.split(".")
    return rest[0] if package == "benchmark" and rest else package


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_down(module: str) -> None:
    own = layer(module)
    for name, line in imports(module):
        other, where = layer(name), f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        if own in ("defenses", "attacks"):
            assert other != {"defenses": "attacks", "attacks": "defenses"}[own], where
            assert other not in ("pipeline", "conformance", "reporting", "cli", "leaderboard"), (
                where
            )
        elif own in LAYERS:
            allowed = {"benchmark", *LAYERS[: LAYERS.index(own) + 1]}
            assert other in allowed, where
        else:
            assert own in ("benchmark", "leaderboard")
            assert other not in ("defenses", "attacks"), where


def test_every_folder_has_its_place() -> None:
    folders = {p.parent.name for p in (ROOT / "benchmark").glob("*/__init__.py")}
    assert folders == set(LAYERS)
    loose = {path.name for path in (ROOT / "benchmark").glob("*.py")}
    assert loose <= {"__init__.py", "__main__.py"}


def test_no_circles() -> None:
    # A package's __init__ re-exports its modules, which is no circle unless they import it back.
    graph = {m: {name for name, _ in imports(m)} - {m} for m in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
