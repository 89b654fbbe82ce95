"""The public page: ``unmergebench leaderboard build`` and ``serve``. Static, from entries alone."""

from leaderboard.site.build import build
from leaderboard.site.serve import serve

__all__ = ["build", "serve"]
