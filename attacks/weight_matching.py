"""Weight matching: rename hidden units and heads back to an anchor's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from benchmark.anatomy import permute_heads
from benchmark.anatomy.alignment import align_units, match_heads
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.errors import UsageError
from benchmark.core.state import State


@dataclass(frozen=True)
class WeightMatching(Attack):
    """Per MLP block π = argmax_π Σ_i C[i, π(i)], W1 ← W1[π], W2 ← W2[:, π].

    C[i, j] compares unit i of the anchor with unit j of the released model: the inner product of
    all their weights (``cost=inner``) or the cosine of their rows of W1 (``cost=cosine``). Heads
    are matched by the cosines of WqᵀWk and Wo·Wv, which no gauge changes. Channels of convolutional
    networks are matched together, one group after the other until nothing moves
    (:mod:`benchmark.anatomy.coupled`). Only renames: the function stays exactly the same.
    """

    card: ClassVar[Card] = Card(
        summary="match hidden units, channels and heads to an anchor by linear assignment",
        paper="Git Re-Basin: Merging Models modulo Permutation Symmetries",
        authors="Ainsworth, Hayase, Srinivasa",
        arxiv="2209.04836",
        fidelity="faithful",
        exact=True,
        notes="the residual stream is shared with the base, so each block is matched on its own; "
        "the matching of heads is ours, and so is the second start where channels are coupled",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    anchor: Literal["base", "partner"] = "base"
    cost: Literal["inner", "cosine"] = "inner"
    heads: bool = True

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if self.anchor == "partner" and not knowledge.partners:
            raise UsageError("weight-matching(anchor=partner) needs a partner; use anchor=base")
        anchor = knowledge.base if self.anchor == "base" else knowledge.partners[0]
        state = dict(released)
        if self.heads:
            for attention in knowledge.anatomy.attention:
                permute_heads(state, attention, match_heads(attention, state, anchor))
        align_units(state, anchor, knowledge.anatomy, self.cost)
        return state
