"""Where things lie in a repository."""

from pathlib import Path

#: Its entries.
ENTRIES = Path("leaderboard/entries")
