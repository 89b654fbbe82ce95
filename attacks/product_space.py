"""Product space: merge what a head computes, not the two factors a lock can hide it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, AttentionBlock
from benchmark.anatomy.alignment import (
    align_units,
    head_sides,
    match_heads,
    qk_gauge,
    write_sides,
)
from benchmark.anatomy.gauge import apply_qk, permute_heads
from benchmark.api.contracts import Access, Attack, Card, Knowledge, Merger
from benchmark.core.state import State
from benchmark.merging.wrapped import WrappedMerger

Part = Literal["qk", "vo"]


@dataclass(frozen=True)
class ProductSpace(Attack):
    """Per head, the merger sees P = WqᵀWk (query bias as an extra input) and Wv, Wo as one product:

        P* = merge(P_1, …),   P* ≈ U_r·S_r·V_rᵀ (r = dh),   Wq = S_r^½·U_rᵀ,  Wk = S_r^½·V_rᵀ

    A lock cancels in P, so there is nothing left to undo. Heads and hidden units are matched with
    the base first. Where the architecture restricts Q and K, only V and O are merged this way (what
    stands between Q and K makes their product alone no invariant), and Q and K are aligned with the
    base inside their group.
    """

    card: ClassVar[Card] = Card(
        summary="merge the products WqᵀWk and WoWv of each head, refactored at rank dh",
        fidelity="ours",
        notes="the merged product is cut to rank dh, which also changes an undefended merge",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state, base = dict(released), knowledge.base
        for block in knowledge.anatomy.attention:
            permute_heads(state, block, match_heads(block, state, base))
            if block.qk_gauge != "general":
                apply_qk(state, block, qk_gauge(block, state, base))
        align_units(state, base, knowledge.anatomy)
        return state

    def merging(self, merger: Merger, anatomy: Anatomy) -> Merger:
        return _Products(merger, self, anatomy)


class _Products(WrappedMerger):
    """``inner`` on States whose attention factors are replaced by their products."""

    def __init__(self, inner: Merger, attack: Attack, anatomy: Anatomy) -> None:
        super().__init__(inner, attack)
        self.anatomy = anatomy

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[..., State]:
        lifted = [self._lift(state, base) for state in (base, *experts)]
        merged = self.inner.prepare(lifted[0], lifted[1:], knowledge, rng)
        return lambda setting: self._lower(merged(setting), base)

    def _places(self) -> Iterator[tuple[str, AttentionBlock, Part]]:
        for i, block in enumerate(self.anatomy.attention):
            parts: tuple[Part, ...] = ("qk", "vo") if block.qk_gauge == "general" else ("vo",)
            for part in parts:
                yield f"product.{i}.{part}", block, part

    def _lift(self, state: State, base: State) -> State:
        """Products beside the other tensors; the factors as in the base: no τ is left in them."""
        out = dict(state)
        for key, block, part in self._places():
            x, y = head_sides(block, state, part)
            out[key] = (x.mT @ y).float()
            write_sides(out, block, part, *head_sides(block, base, part))
        return out

    def _lower(self, merged: State, base: State) -> State:
        out = dict(merged)
        for key, block, part in self._places():
            product = out.pop(key).double()
            _, start = head_sides(block, base, part)
            write_sides(out, block, part, *_factors(product, start))
        return out


def _factors(product: Tensor, start: Tensor, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """X (heads, r, m), Y (heads, r, n) with XᵀY the best rank-r approximation of ``product``.

    Block power iteration from the rows of ``start`` (heads, r, n): near the answer, since the
    merged product is near the base's.
    """
    v = torch.linalg.qr(start.mT).Q
    for _ in range(rounds):
        u = torch.linalg.qr(product @ v).Q
        v = torch.linalg.qr(product.mT @ u).Q
    left, s, right = torch.linalg.svd(u.mT @ product @ v)
    root = s.sqrt()[:, None, :]
    return ((u @ left) * root).mT, ((v @ right.mT) * root).mT
