"""The sha256 by which an entry names the code of its defense."""

from __future__ import annotations

from typing import Any


def sha256(method: Any) -> str:
    """Of a method's parameters and of the source it is made of."""
    from benchmark.pipeline.fingerprint import sha
    from benchmark.pipeline.workbench import method_key

    return sha(method_key(method))
