"""Mergers in the singular directions of each task matrix: TSV-M, Iso-C, CART.

Vectors (biases, norms) are averaged with the same coefficients (CART: whole), as the authors do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State, task_vector
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import GridMerger, active, searched

#: These mergers scale the sum of all members by one number: a shared λ around 1.
_SHARED = (0.3, 0.5, 0.7, 1.0, 1.3)

#: What a merger finds out about a matrix before it knows the coefficients.
Parts = TypeVar("Parts")
#: Orthogonal left and right directions, and between them each member's singular values.
Bases = tuple[Tensor, list[Tensor], Tensor]
#: The mean of the members, and each member's low-rank part around it.
Centred = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class _Spectral(GridMerger, Generic[Parts]):
    """Per matrix, a merged τ from the members' coefficient-weighted τ."""

    #: Whether a member that did not move a matrix counts there, by τ = 0, or has no directions.
    still_counts: ClassVar[bool] = False

    grid: tuple[float, ...] = searched((0.0, 0.5, 1.0))
    shared: tuple[float, ...] = searched(_SHARED)

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [task_vector(expert, base) for expert in experts]
        made: dict[tuple[str, tuple[int, ...]], Parts] = {}

        def delta(i: int, key: str) -> Tensor:
            return wide(taus[i][key] if key in taus[i] else torch.zeros_like(base[key]))

        def matrix(key: str, present: list[tuple[int, float]], members: int) -> Tensor:
            where = (key, tuple(i for i, _ in present))
            if where not in made:
                made[where] = self._decompose(
                    [delta(i, key).flatten(1) for i, _ in present], members
                )
            return self._combine(made[where], [c for _, c in present])

        def merged(setting: Setting) -> State:
            members = active(setting, len(taus))
            out = dict(base)
            for key in moved(taus[i] for i, _ in members):
                present = [(i, c) for i, c in members if self.still_counts or key in taus[i]]
                if base[key].ndim < 2:
                    vectors = [delta(i, key) for i, _ in present]
                    step = self._vector([c for _, c in present], vectors) / len(members)
                else:
                    step = matrix(key, present, len(members)).reshape(base[key].shape)
                out[key] = (wide(base[key]) + step).to(base[key].dtype)
            return out

        return merged

    def _vector(self, weights: list[float], deltas: list[Tensor]) -> Tensor:
        """The merged τ of one vector times the number of members."""
        return _weighted(weights, deltas)

    @abstractmethod
    def _decompose(self, deltas: list[Tensor], members: int) -> Parts:
        """What no coefficient changes: found once for each matrix and choice of members.

        ``deltas``: (n, m) each, of those of the ``members`` that count for this matrix.
        """

    @abstractmethod
    def _combine(self, parts: Parts, weights: list[float]) -> Tensor:
        """The merged τ of one matrix, (n, m), for the coefficients of its ``deltas``."""


@dataclass(frozen=True)
class TSV(_Spectral[Bases]):
    """Task singular vectors, merged: each τ cut to 1/N of its rank, directions orthogonalised.

    τ_i ≈ U_i·S_i·V_iᵀ (the top r = min(n, m)/N);  U = [U_1 … U_N], S = diag(c_i·S_i), V likewise
    U⊥ = P·Qᵀ from U = P·D·Qᵀ (Procrustes), V⊥ likewise;   τ = U⊥·S·V⊥ᵀ
    """

    card: ClassVar[Card] = Card(
        summary="Keeps the top singular vectors of each task and makes them orthogonal",
        paper="Task Singular Vectors: Reducing Task Interference in Model Merging",
        authors="Antonio Andrea Gargiulo et al.",
        arxiv="2412.00081",
        fidelity="faithful",
    )

    def _decompose(self, deltas: list[Tensor], members: int) -> Bases:
        rank = max(1, min(deltas[0].shape) // members)
        parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
        right = torch.cat([v[:rank] for _, _, v in parts])
        return _orthogonal(left), [s[:rank] for _, s, _ in parts], _orthogonal(right.mT).mT

    def _combine(self, parts: Bases, weights: list[float]) -> Tensor:
        left, spectra, right = parts
        s = torch.cat([c * s for c, s in zip(weights, spectra, strict=True)])
        return (left * s) @ right


@dataclass(frozen=True)
class IsoC(_Spectral[list[Tensor]]):
    """Isotropic merging in the common subspace: the sum of all τ with a flat spectrum.

    Σ c_i·τ_i = U·S·Vᵀ,   τ = mean(S)·U·Vᵀ
    """

    # A flat spectrum is as large as the mean of the singular values: short fine-tunings want more.
    grid: tuple[float, ...] = searched((0.0, 1.0, 2.0, 4.0))
    shared: tuple[float, ...] = searched((0.5, 1.0, 1.5, 2.0, 3.0))

    card: ClassVar[Card] = Card(
        summary="Flattens the spectrum of the summed task matrix",
        paper="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific "
        "Subspaces",
        authors="Daniel Marczak et al.",
        arxiv="2502.04959",
        fidelity="faithful",
    )

    def _decompose(self, deltas: list[Tensor], members: int) -> list[Tensor]:
        return deltas  # the coefficients change the singular vectors of the sum

    def _combine(self, parts: list[Tensor], weights: list[float]) -> Tensor:
        total = _weighted(weights, parts)
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        return s.mean() * (u @ v)


@dataclass(frozen=True)
class Cart(_Spectral[Centred]):
    """Centred, rank-reduced task vectors.

        θ̄ = mean(θ_i),   τ = (θ̄ − θ0) + Σ c_i · LR_r(θ_i − θ̄),   r = ⌈``rank`` · min(n, m)⌉

    The coefficients weigh the low-rank parts; the average is always whole, and all of what is made
    of a vector. A member that did not move a matrix still lies off the centre, by θ0 − θ̄.
    """

    rank: float = 0.08

    still_counts: ClassVar[bool] = True

    card: ClassVar[Card] = Card(
        summary="Adds low-rank parts of each expert to the average of all",
        paper="Revisiting Weight Averaging for Model Merging",
        authors="Jiho Choi et al.",
        arxiv="2412.12153",
        fidelity="faithful",
        notes="rank 8 % as in the paper's main results",
    )

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1:
            raise ValueError(f"need 0 < rank <= 1, got {self.rank}")
        super().__post_init__()

    def _vector(self, weights: list[float], deltas: list[Tensor]) -> Tensor:
        return _weighted([1.0] * len(deltas), deltas)

    def _decompose(self, deltas: list[Tensor], members: int) -> Centred:
        centre = _weighted([1.0] * len(deltas), deltas) / members
        rank = math.ceil(self.rank * min(deltas[0].shape))
        cut = []
        for delta in deltas:
            u, s, v = torch.linalg.svd(delta - centre, full_matrices=False)
            cut.append((u[:, :rank] * s[:rank]) @ v[:rank])
        return centre, cut

    def _combine(self, parts: Centred, weights: list[float]) -> Tensor:
        centre, cut = parts
        return centre + _weighted(weights, cut)


def _weighted(weights: list[float], parts: list[Tensor]) -> Tensor:
    return sum((c * part for c, part in zip(weights, parts, strict=True)), torch.zeros(()))


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes)."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v
