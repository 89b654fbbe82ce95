"""Canonical form: write every member in coordinates that no lock can choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import AttentionBlock, apply_qk, apply_vo, permute_heads
from benchmark.anatomy.alignment import align_units, head_sides, match_heads, qk_gauge
from benchmark.api.contracts import Access, Attack, Card, Knowledge, Members
from benchmark.core.errors import MethodError
from benchmark.core.state import State

Apply = Callable[[State, AttentionBlock, Tensor], None]


@dataclass(frozen=True)
class Canonical(Attack):
    """SVD-canonicalise the invariants of *every* member of the merge, base included.

    Per head, WqᵀWk (query bias as an extra input) = U·S·Vᵀ; likewise Wv and Wo:

        Wq ← R·S^½·Uᵀ,  Wk ← R·S^½·Vᵀ,   R orthogonal

    R is the Procrustes rotation to the reference member's canonical form: it settles signs and
    near-equal singular values. Heads and hidden units are matched to the reference first. The
    reference is a partner (an expert of the free-rider's own): the base enters only as a member.
    Exactly function-preserving. Where the architecture restricts Q and K, they are aligned with the
    reference inside their group instead (:func:`benchmark.anatomy.alignment.qk_gauge`).
    """

    card: ClassVar[Card] = Card(
        summary="express every member in the SVD coordinates of its own invariants",
        fidelity="ours",
        exact=True,
        notes="needs no trust in the base as an anchor",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return self.members(released, knowledge, rng).released

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        everyone = [dict(s) for s in (knowledge.base, released, *knowledge.partners)]
        reference = everyone[-1]
        for block in knowledge.anatomy.attention:
            for state in everyone:
                if state is not reference:
                    permute_heads(state, block, match_heads(block, state, reference))
            if block.qk_gauge == "general":
                _canonicalise(everyone, block, "qk", apply_qk)
            else:
                for state in everyone[:-1]:
                    apply_qk(state, block, qk_gauge(block, state, reference))
            _canonicalise(everyone, block, "vo", apply_vo)
        for state in everyone[:-1]:
            align_units(state, reference, knowledge.anatomy)
        base, victim, *partners = everyone
        return Members(base, victim, tuple(partners))


def _canonicalise(
    everyone: Sequence[State], block: AttentionBlock, part: Literal["qk", "vo"], apply: Apply
) -> None:
    """Edits every State (shallow copies); the last one is the reference."""
    reference: tuple[Tensor, Tensor] | None = None
    for state in reversed(everyone):
        x, y = head_sides(block, state, part)
        a = _coordinates(x, y)
        canonical = a @ x, torch.linalg.solve(a.mT, y)
        if reference is None:
            reference = canonical
        else:
            inner = sum(ref @ own.mT for ref, own in zip(reference, canonical, strict=True))
            u, _, v = torch.linalg.svd(inner)
            a = u @ v @ a
        apply(state, block, a)


def _coordinates(x: Tensor, y: Tensor) -> Tensor:
    """A with A·X = S^½·Uᵀ and A^-T·Y = S^½·Vᵀ, where XᵀY = U·S·Vᵀ: (kv_heads, dh, dh).

    Through two QR decompositions, so that no d × d product is formed.

    Raises:
        MethodError: a head has lost rank, so that its invariant does not determine its weights.
    """
    left, right = (torch.linalg.qr(side.mT, mode="r").R for side in (x, y))
    u, s, _ = torch.linalg.svd(left @ right.mT)
    if bool((s[:, -1] <= 1e-12 * s[:, 0]).any()):
        raise MethodError("canonical: an attention head is not of full rank")
    return torch.linalg.solve(left, (u * s.sqrt()[:, None, :])).mT
