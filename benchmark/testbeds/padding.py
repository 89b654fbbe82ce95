"""Padded texts in chunks: which rows run together, and how much of their padding is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """``rows`` (n,) of a batch that run together, cut to ``width`` tokens.

    ``full``: known to have no padding left.
    """

    rows: Tensor
    width: int
    full: bool


def chunks(mask: Tensor, size: int) -> tuple[list[Chunk], Tensor]:
    """At most ``size`` rows each, and the order that brings their results back into place.

    ``mask`` (n, tokens) is 1 where a token is, which comes before all padding. On a CPU rows go
    longest first, each chunk cut to its longest row: padding is hardly computed, and it never
    changes a result beyond rounding. On a GPU, where asking for lengths would make the host wait,
    rows stay as they come and nothing is cut.
    """
    order = torch.arange(len(mask), device=mask.device)
    if mask.device.type != "cpu":
        return [Chunk(rows, mask.shape[1], False) for rows in order.split(size)], order
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    widths = lengths.clamp(min=1).tolist()
    made = []
    for start in range(0, len(mask), size):
        rows = order[start : start + size]
        width = widths[start]
        made.append(Chunk(rows, width, widths[start + len(rows) - 1] == width))
    return made, order.argsort()
