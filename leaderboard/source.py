"""The sha256 by which an entry names the code of its defense."""

from __future__ import annotations

from benchmark.api.contracts import Defense
from benchmark.core.keys import sha
from benchmark.pipeline import identity


def sha256(method: Defense) -> str:
    """Of a method's parameters and of the source it is made of."""
    return sha(identity.method(method))
