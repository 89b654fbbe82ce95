"""A lock outside the blocks: what alignment of heads and hidden units does not see. Ours.

:class:`defenses.full_gauge.FullGauge` restricted to the residual stream, norms, embeddings, value
biases, layer scales and batch norms. Heads and hidden units stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from benchmark.api.contracts import Card
from defenses.full_gauge import OUTSIDE, FullGauge


@dataclass(frozen=True)
class ResidualLock(FullGauge):
    """One random element of every gauge outside attention heads and hidden units."""

    card: ClassVar[Card] = replace(
        FullGauge.card,
        summary="Moves the stream, norms and embeddings by a random element of their gauges",
        notes="the part of full-gauge that no published lock touches; the seed is the key",
    )

    kinds: tuple[str, ...] = OUTSIDE
