"""Tensors that are made once and kept in the cache (tokenised texts, small pretrained bases)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from benchmark.core.paths import cache, replacing, sweep
from benchmark.core.state import digest


def kept(name: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of ``make()``, from the cache where ``key`` was made before.

    ``key`` must determine the result. A file that is unreadable or whose tensors do not have the
    digest they were written with is made again.
    """
    path = cache() / "testbeds" / f"{name}-{key[:16]}.safetensors"
    found = _read(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            found = _read(path)
            if found is None:
                found = {k: v.contiguous() for k, v in make().items()}
                _write(path, found)
    return found


def hashed_fields(testbed: Any) -> dict[str, Any]:
    """The fields of a testbed that say what it holds. ``lora`` is named only where it is set: what
    was measured before testbeds had it stays valid."""
    found = dataclasses.asdict(testbed)
    return {name: value for name, value in found.items() if value or name != "lora"}


def _read(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as source:
            tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
            written = (source.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    return tensors if digest(tensors) == written else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from benchmark.io import tensorfiles

    sweep(path)
    with replacing(path) as temporary:
        tensorfiles.save(temporary, tensors, {"digest": digest(tensors)})
