"""A few grey pictures as text, for records."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from benchmark.core.errors import UnmergeBenchError

#: Pixels in all, at most.
MOST = 20_000
_SHAPE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3}):([0-9a-f]*)")


def pack(pictures: NDArray[np.floating]) -> str:
    """Pictures (k, h, w) within [0, 1] as ``KxHxW:`` and a byte in hex for each pixel.

    Raises:
        ValueError: they have more than ``MOST`` pixels.
    """
    if pictures.size > MOST:
        raise ValueError(f"{pictures.size} pixels; a record holds {MOST}")
    grey = np.round(np.clip(np.nan_to_num(pictures), 0, 1) * 255).astype(np.uint8)
    return "x".join(map(str, grey.shape)) + ":" + grey.tobytes().hex()


def unpack(text: str) -> NDArray[np.uint8]:
    """The inverse of :func:`pack`: (k, h, w).

    Raises:
        UnmergeBenchError: not such a text.
    """
    found = _SHAPE.fullmatch(text)
    shape = [int(part) for part in found.groups()[:3]] if found else [0]
    size = int(np.prod(shape))
    if found is None or size > MOST or len(found.group(4)) != 2 * size:
        raise UnmergeBenchError(f"damaged pictures {text[:16]!r}...")
    return np.frombuffer(bytes.fromhex(found.group(4)), dtype=np.uint8).reshape(shape)
