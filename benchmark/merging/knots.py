"""KnOTS: align LoRA updates by one SVD, then merge (arXiv 2410.19735).

    [ΔW_1 … ΔW_n] = U·Σ·[V_1ᵀ … V_nᵀ]        side by side: the directions U are shared
    τ = U · merge(Σ·V_1ᵀ, …, Σ·V_nᵀ)          merge: TIES, or task arithmetic

Σ stands with V_i, as in the authors' code, so that Σ·V_iᵀ = Uᵀ·ΔW_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card
from benchmark.core.lowrank import thin_svd
from benchmark.merging.shared_basis import Coordinates, SharedBasisMerger


@dataclass(frozen=True)
class Knots(SharedBasisMerger):
    """Merge in the left singular directions of all updates side by side.

    Attributes: those of :class:`benchmark.merging.shared_basis.SharedBasisMerger`. The authors'
    TIES keeps 20 % of all coordinates and takes the disjoint mean (``normalize=true``).
    """

    card: ClassVar[Card] = Card(
        summary="Aligns low-rank updates by a joint SVD, then merges them by TIES",
        paper="Model Merging with SVD to Tie the KnOTS",
        authors="George Stoica et al.",
        arxiv="2410.19735",
        fidelity="faithful",
        notes="the updates are read off full States; singular values under float32's rounding are "
        "dropped where the authors' code drops those under 1e-5; a coefficient per member, and "
        "the disjoint sum unless normalize=true, as in our ties",
    )

    def _coordinates(self, deltas: list[Tensor], floor: float) -> Coordinates:
        shared, _, _ = thin_svd(torch.cat(deltas, 1), floor)
        return [shared.mT @ delta for delta in deltas], lambda merged: shared @ merged
