"""The plain baseline: hidden units and the residual axis, renamed at random.

Entezari et al. (arXiv 2110.06296) and Git Re-Basin (Ainsworth et al., arXiv 2209.04836) describe
the symmetry; as a defense it costs nothing, and one linear assignment per permutation undoes it.
(The residual axis can be renamed where the State holds both its ends: embeddings and head.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from benchmark.anatomy.gauges.blocks import UnitOrder
from benchmark.anatomy.gauges.stream import StreamPermutation
from benchmark.api.contracts import Card
from defenses.full_gauge import FullGauge


@dataclass(frozen=True)
class RandomPermutation(FullGauge):
    """Random permutations of hidden units (channels) and of the residual axis."""

    card: ClassVar[Card] = replace(
        FullGauge.card,
        summary="Renames hidden units and the residual axis at random",
        arxiv="2209.04836",
        locks=False,
        notes="the baseline that any lock has to beat; the seed is the key",
    )

    kinds: tuple[str, ...] = (UnitOrder.kind, StreamPermutation.kind)
