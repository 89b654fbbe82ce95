"""The k-th greatest magnitude of a task vector, without sorting or storing it.

Magnitudes of one float format are ordered as their bits are, read as integers. So a histogram of
the 16 highest bits says which numbers those bits share with the k-th greatest; when few entries
(:data:`GATHER`) have them, the k-th greatest is selected among those, else the next 16 bits decide.
One pass over τ for the histogram and one for the gathering, with a megabyte or two of memory; up to
:data:`GATHER` entries, only the second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.merging.streaming import Difference

#: Entries that are selected among in memory (16 MiB of float32).
GATHER = 2**22

_DIGIT = 16


def threshold(parts: Sequence[Difference], count: int) -> Tensor:
    """The ``count``-th greatest magnitude over all parts, 0 where there are not that many.

    A 0-D tensor, float32 or float64, on the parts' device: a GPU need not be waited for.
    """
    size = sum(map(len, parts))
    dtypes = (part.base.dtype for part in parts)
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    if count >= size:
        return torch.zeros((), dtype=dtype, device=parts[0].base.device if parts else None)
    if parts[0].base.device.type != "cpu":
        flat = torch.cat([part[:].to(dtype).abs() for part in parts])
        return flat.kthvalue(size - count + 1).values
    bits = torch.tensor(_select(parts, count, dtype), dtype=_integer(dtype))
    return bits.view(dtype)


def _select(parts: Sequence[Difference], count: int, dtype: torch.dtype) -> int:
    """The bits of the ``count``-th greatest."""
    prefix, shift, left = None, 8 * dtype.itemsize, sum(map(len, parts))
    while left > GATHER and shift:
        shift -= _DIGIT
        histogram = np.zeros(1 << _DIGIT, dtype=np.int64)
        for part in parts:
            for piece in part:
                bits = _sharing(piece, dtype, prefix, shift + _DIGIT)
                digits = (bits >> shift) & ((1 << _DIGIT) - 1)
                histogram += np.bincount(digits, minlength=1 << _DIGIT)
        above = histogram[::-1].cumsum()
        place = int(np.searchsorted(above, count))
        digit = len(histogram) - 1 - place
        left = int(histogram[digit])
        count -= int(above[place]) - left
        prefix = ((prefix or 0) << _DIGIT) | digit
    if prefix is not None and not shift:
        return prefix
    found = np.concatenate(
        [_sharing(piece, dtype, prefix, shift) for part in parts for piece in part]
    )
    found.partition(len(found) - count)
    return int(found[len(found) - count])


def _sharing(
    piece: Tensor, dtype: torch.dtype, prefix: int | None, shift: int
) -> NDArray[np.signedinteger]:
    """The magnitudes, as integers, whose bits from ``shift`` up are ``prefix`` (None: all)."""
    bits = piece.to(dtype).abs().view(_integer(dtype)).numpy()
    return bits if prefix is None else bits[(bits >> shift) == prefix]


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int64
