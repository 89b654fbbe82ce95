"""The anchor-guided attack: pull each projection of each head back to the base by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import AttentionBlock
from benchmark.anatomy.alignment import align_units
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class AnchorGuidedAttack(Attack):
    """Per head and per projection on its own, in float64:

        T = argmin_T ‖W'ᵀ·T − W0ᵀ‖² + ridge·‖T‖²,   W ← Tᵀ·W',  b ← Tᵀ·b',

    for the rows of Q, K and V and (transposed) the columns of O; then the hidden units are matched
    by the cosines of the rows of W1. The four T of a head are not tied, so the function changes,
    and a share dh/d of the task vector is projected away.
    """

    card: ClassVar[Card] = Card(
        summary="per-head least squares to the base on each projection, then unit matching",
        paper="arXiv 2606.30360 (ECCV 2026)",
        arxiv="2606.30360",
        fidelity="reconstruction",
        exact=False,
        notes="from a summary of the paper; not function-preserving",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    ridge: float = 1e-8

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError("ridge must be > 0")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, state = knowledge.base, dict(released)
        for block in knowledge.anatomy.attention:
            self._attention(state, block, base)
        align_units(state, base, knowledge.anatomy, "cosine")
        return state

    def _attention(self, state: State, block: AttentionBlock, base: State) -> None:
        name: Literal["q", "k", "v"]
        for name in ("q", "k", "v"):
            own, anchor = (
                block.read(s, name).unflatten(1, (-1, block.head_dim)) for s in (state, base)
            )
            # The last column is the bias: it goes along and is not fitted.
            block.write(state, name, self._fit(own[..., :-1], anchor[..., :-1]) @ own)
        own, anchor = block.read_o(state).mT, block.read_o(base).mT
        block.write_o(state, (self._fit(own, anchor) @ own).mT)

    def _fit(self, own: Tensor, anchor: Tensor) -> Tensor:
        """Tᵀ of each head: (..., dh, dh), from rows (..., dh, m)."""
        eye = torch.eye(own.shape[-2], dtype=own.dtype, device=own.device)
        return torch.linalg.solve(own @ own.mT + self.ridge * eye, anchor @ own.mT, left=False)
