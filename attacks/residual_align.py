"""Alignment outside the blocks alone: streams, norms, embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import gauges
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class ResidualAlign(Attack):
    """The gauges outside heads and hidden units, brought back to the base's (METHODS section 1).

    Outer ones first: the residual axis by one assignment (Procrustes where it may rotate) on
    embeddings and heads; norm gains, shifts and layer scales set to the base's, with the ratio
    folded into their readers; each reader's component along 1/γ, each writer's along 1, the value
    biases and the mean of the embeddings likewise; then least distance over each in turn. The part
    of `gauge-align` that answers `residual-lock`, by itself to tell what does what.
    """

    card: ClassVar[Card] = Card(
        summary="align stream, norms and embeddings with the base, heads and units as they are",
        fidelity="ours",
        exact=True,
        notes="one closed form per gauge; answers residual-lock, part of gauge-align",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        group = gauges.of(knowledge.anatomy, released).exact
        return group.without(gauges.BLOCKS).align(released, knowledge.base)
