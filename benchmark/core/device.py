"""``--device auto|cpu|cuda``."""

from __future__ import annotations

import torch

from benchmark.core.errors import UsageError


def resolve(name: str) -> torch.device:
    """The device behind a ``--device`` value.

    Raises:
        UsageError: an unknown device, or CUDA asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; use --device cpu (or auto)")
    return device
