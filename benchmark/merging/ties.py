"""TIES: trim, elect a sign, merge the members that agree with it (arXiv 2306.01708).

    trim      τ̂_i = the entries of τ_i among its top ``density`` by magnitude, the others 0
    elect     γ = sign(Σ c_i · τ̂_i), with sign(0) = + as in mergekit
    merge     τ = scale · Σ_{sign τ̂_i = γ} c_i · τ̂_i   [ / Σ_{sign τ̂_i = γ} c_i  if normalize ]

TIES is not one method. ``scope=global`` trims over the whole flattened τ, as the authors' code and
FusionBench do: entries that did not move count as zeros (embeddings that stayed frozen make the
trimming of the rest milder). ``scope=tensor`` trims each tensor by itself, as mergekit does. The
authors' "disjoint mean" is ``normalize=true`` with equal coefficients and ``scale`` = λ; mergekit's
default is ``scope=tensor, normalize=true``. Entries that tie with the threshold are all kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from benchmark.checkpoint import State, task_vector
from benchmark.contracts import Card, Knowledge, Setting
from benchmark.merging.tau import GridMerger, active, searched, weighted_sum, wide

Scope = Literal["global", "tensor"]


@dataclass(frozen=True)
class Ties(GridMerger):
    """Trim, elect sign, disjoint merge.

    Attributes:
        density: share of entries kept, in (0, 1].
        scope: trim over the whole τ (``global``) or each tensor by itself (``tensor``).
        normalize: divide by the coefficients of the members that agree.
        scale: factor on the merged τ (a setting's parameter ``scale`` takes its place).
    """

    density: float = 0.2
    scope: Scope = "global"
    normalize: bool = False
    scale: float = 1.0
    grid: tuple[float, ...] = searched((0.0, 1.0, 1.5))
    shared: tuple[float, ...] = searched((0.3, 0.5, 0.7, 1.0, 1.5))

    card: ClassVar[Card] = Card(
        summary="Trims task vectors, elects a sign per entry, sums the members that agree",
        paper="TIES-Merging: Resolving Interference When Merging Models",
        authors="Prateek Yadav et al.",
        arxiv="2306.01708",
        fidelity="faithful",
        notes="scope and normalize say whose TIES it is; see the docstring",
    )

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"need 0 < density <= 1, got {self.density}")
        if not math.isfinite(self.scale):
            raise ValueError(f"need a finite scale, got {self.scale}")
        super().__post_init__()

    def search_space(self, members: int) -> list[Setting]:
        """As for every merger of its kind; with ``normalize`` only ratios matter, and ``scale``."""
        settings = super().search_space(members)
        if not self.normalize:
            return settings
        ratios: dict[tuple[float, ...], None] = {}
        for setting in settings:
            greatest = max(setting.coefficients, key=abs)
            ratios[tuple(round(c / greatest, 6) for c in setting.coefficients)] = None
        scales = [value for value in (self.grid if members <= 2 else self.shared) if value]
        return [Setting(ratio, {"scale": scale}) for ratio in ratios for scale in scales]

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        total = sum(v.numel() for v in base.values() if v.is_floating_point())
        taus = [
            trim(task_vector(expert, base), self.density, self.scope, total) for expert in experts
        ]

        def merged(setting: Setting) -> State:
            kept = [(c, taus[i]) for i, c in active(setting, len(taus))]
            scale = setting.parameters.get("scale", self.scale)
            return weighted_sum(base, [(scale, elect(kept, self.normalize))])

        return merged


def trim(tau: State, density: float, scope: Scope, total: int) -> State:
    """The entries of τ with the greatest magnitude; ``total`` is the length of the flattened τ."""
    if scope == "tensor":
        return {
            key: _keep(delta, threshold([delta], max(1, int(density * delta.numel()))))
            for key, delta in tau.items()
        }
    cut = threshold(list(tau.values()), max(1, int(density * total)))
    return {key: _keep(delta, cut) for key, delta in tau.items()}


def threshold(parts: list[Tensor], count: int) -> float:
    """The ``count``-th greatest magnitude over all parts, 0 where there are not that many."""
    size = sum(part.numel() for part in parts)
    if count >= size:
        return 0.0
    flat = torch.cat([wide(part).abs().reshape(-1) for part in parts])
    if flat.is_cuda:
        return float(flat.kthvalue(size - count + 1).values)
    # Selection, not sorting: tens of millions of entries in a fraction of a second.
    return float(np.partition(flat.numpy(), size - count)[size - count])


def _keep(delta: Tensor, threshold: float) -> Tensor:
    return torch.where(delta.abs() >= threshold, delta, 0)


def elect(members: Sequence[tuple[float, State]], normalize: bool) -> State:
    """The merged τ of (coefficient, trimmed τ) pairs: entries that disagree with γ are left out."""
    keys = dict.fromkeys(key for _, tau in members for key in tau)
    return {
        key: _elect([(c, wide(tau[key])) for c, tau in members if key in tau], normalize)
        for key in keys
    }


def _elect(members: Sequence[tuple[float, Tensor]], normalize: bool) -> Tensor:
    weighted = [c * delta for c, delta in members]
    up = _sum([w.clamp(min=0) for w in weighted])
    down = _sum([w.clamp(max=0) for w in weighted])
    positive = up + down >= 0  # γ = +
    merged = torch.where(positive, up, down)
    if not normalize:
        return merged
    weight_up = _sum([c * (w > 0) for (c, _), w in zip(members, weighted, strict=True)])
    weight_down = _sum([c * (w < 0) for (c, _), w in zip(members, weighted, strict=True)])
    weight = torch.where(positive, weight_up, weight_down)
    return merged / torch.where(weight.abs() < 1e-8, 1.0, weight)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
