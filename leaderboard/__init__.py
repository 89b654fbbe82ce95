"""Rankings across runs. Schema, entries and the site build on these."""

from leaderboard.runs import combine, load_runs

__all__ = ["combine", "load_runs"]
