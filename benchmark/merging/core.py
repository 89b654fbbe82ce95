"""Core Space merging: merge LoRA updates as small matrices (arXiv 2509.17786).

With ΔW_i = B_i·A_i of rank r_i, R = Σ r_i::

    [B_1 … B_n] = U·S·Xᵀ        reference basis of the outputs, (out, R)
    [A_1; …; A_n] = Y·S'·Vᵀ      reference basis of the inputs, (in, R)
    M_i = Uᵀ·B_i·A_i·V           core matrix, (R, R)
    τ = U · merge(M_1, …, M_n) · Vᵀ

The bases hold every B_i and A_i, so ΔW_i = U·M_i·Vᵀ: the projection loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card
from benchmark.core.lowrank import thin_svd
from benchmark.merging.shared_basis import Coordinates, SharedBasisMerger
from benchmark.merging.ties import Scope


@dataclass(frozen=True)
class Core(SharedBasisMerger):
    """Merge the core matrices.

    Attributes: those of :class:`benchmark.merging.shared_basis.SharedBasisMerger`; TIES trims each
    core matrix by itself, as in the authors' code.
    """

    scope: Scope = "tensor"

    card: ClassVar[Card] = Card(
        summary="Merges low-rank updates as core matrices between shared input and output bases",
        paper="Accurate and Efficient Low-Rank Model Merging in Core Space",
        authors="Aniello Panariello et al.",
        arxiv="2509.17786",
        fidelity="reconstruction",
        notes="equations and TIES per matrix as in the authors' code; but a State holds B·A alone, "
        "so A and B are taken balanced from its SVD (B = U·√S, A = √S·Vᵀ), which turns the "
        "reference bases; a coefficient per member, and the disjoint sum unless normalize=true",
    )

    def _coordinates(self, deltas: list[Tensor], floor: float) -> Coordinates:
        parts = [thin_svd(delta, floor) for delta in deltas]
        outputs, _, _ = thin_svd(torch.cat([u * s.sqrt() for u, s, _ in parts], 1))
        _, _, inputs = thin_svd(torch.cat([s.sqrt()[:, None] * v for _, s, v in parts]))
        cores = [outputs.mT @ delta @ inputs.mT for delta in deltas]
        return cores, lambda merged: outputs @ merged @ inputs
