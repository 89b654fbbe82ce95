"""Rankings across runs, and entries of the public leaderboard: ``load_runs``, ``load_entries``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leaderboard.folder import load_entries
    from leaderboard.paths import ENTRIES
    from leaderboard.runs import combine, load_runs

__all__ = ["ENTRIES", "combine", "load_entries", "load_runs"]

_HOMES = {"combine": "runs", "load_runs": "runs", "load_entries": "folder", "ENTRIES": "paths"}


def __getattr__(name: str) -> Any:
    """Public names are imported when asked for: ``import leaderboard`` stays fast."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"leaderboard.{_HOMES[name]}"), name)
