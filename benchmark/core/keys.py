"""A key: the sha256 of whatever determines something."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sha(*parts: Any) -> str:
    """sha256 of a JSON rendering of ``parts``: the key of whatever they determine."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
