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

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State
from benchmark.merging.selection import threshold
from benchmark.merging.streaming import Cut, Difference, Tau, differences, streamed
from benchmark.merging.tau import GridMerger, active, searched

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
        if self.normalize and self.per == "layer":
            raise ValueError("by layer every coefficient counts: per=layer needs normalize=false")
        super().__post_init__()

    def search_space(self, members: int) -> list[Setting]:
        """As for every merger of its kind; with ``normalize`` only ratios matter, and ``scale``."""
        settings = super().search_space(members)
        return self.ratios(settings, members, "scale") if self.normalize else settings

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        total = sum(v.numel() for v in base.values() if v.is_floating_point())
        taus = [
            trim(differences(expert, base), self.density, self.scope, total) for expert in experts
        ]

        def merged(setting: Setting) -> State:
            kept = [(c, taus[i]) for i, c in active(setting, len(taus))]
            scale = setting.parameters.get("scale", self.scale)
            return elected(base, kept, self.normalize, scale)

        return merged


def trim(tau: dict[str, Difference], density: float, scope: Scope, total: int) -> dict[str, Cut]:
    """The entries of τ with the greatest magnitude; ``total`` is the length of the flattened τ."""
    if scope == "tensor":
        found = [threshold([delta], max(1, int(density * len(delta)))) for delta in tau.values()]
    else:
        found = [threshold(list(tau.values()), max(1, int(density * total)))] * len(tau)
    # One transfer for all tensors: a GPU is waited for once.
    cuts = torch.stack([cut.double() for cut in found]).tolist() if found else []
    return {key: Cut(delta, cut) for (key, delta), cut in zip(tau.items(), cuts, strict=True)}


def elected(
    base: State, members: Sequence[tuple[float, Tau]], normalize: bool = False, scale: float = 1.0
) -> State:
    """The merged State of (coefficient, trimmed τ) pairs: entries against γ are left out."""

    def merge(start: Tensor, deltas: list[tuple[float, Tensor]]) -> Tensor:
        return torch.add(start, _elect(deltas, normalize), alpha=scale)

    return streamed(base, members, merge)


def _elect(members: list[tuple[float, Tensor]], normalize: bool) -> Tensor:
    weighted = [c * delta for c, delta in members]
    up, down = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for value in weighted:
        up += value.clamp(min=0)
        down += value.clamp(max=0)
    positive = _mask(torch.ge, up + down, 0)  # γ = +
    merged = _pick(positive, up, down)
    if not normalize:
        return merged
    weight_up, weight_down = up.zero_(), down.zero_()
    for (coefficient, _), value in zip(members, weighted, strict=True):
        weight_up.add_(_mask(torch.gt, value, 0), alpha=coefficient)
        weight_down.add_(_mask(torch.lt, value, 0), alpha=coefficient)
    weight = _pick(positive, weight_up, weight_down)
    none = _mask(torch.lt, weight.abs(), 1e-8)
    return merged.div_(_pick(none, torch.ones_like(weight), weight))


def _mask(compare: Callable[..., Tensor], value: Tensor, bound: float) -> Tensor:
    """1.0 where the comparison holds, else 0.0: ten times as fast as bool on a CPU."""
    return compare(value, bound, out=torch.empty_like(value))


def _pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``torch.where`` for finite values and a mask of 0.0 and 1.0, without a branch per entry."""
    return torch.addcmul(no, no, mask, value=-1).addcmul_(yes, mask)
