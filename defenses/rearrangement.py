"""The two operations of PaRaMS (arXiv 2503.07661), which several defenses apply.

θ0 is the public base, θ the expert. Rearrangement, per MLP block (a linear assignment problem)::

    C[i, j] = ⟨W1_0[i], W1[j]⟩ + b1_0[i]·b1[j] + ⟨W2_0[:, i], W2[:, j]⟩
    π = argmin_π Σ_i C[i, π(i)]          W1 → W1[π], b1 → b1[π], W2 → W2[:, π]

Scaling, per head: Q → A·Q, K → A^-T·K, V → B·V, O → O·B^-1, biases too, with

* ``diagonal`` (the paper; the default here): A = diag(α), a factor per dimension, α ~ U(0.05, 20);
* ``symmetric``: A = U·diag(s)·Uᵀ, U orthogonal, s log-uniform on [0.05, 20];
* ``nonsymmetric``: A = (G + ε·I)·diag(s), G Gaussian, ε = 1e-3, s log-uniform on [0.1, 15].

Today's official code defaults to ``nonsymmetric`` and reuses A for B (``tied``); the paper draws
them independently. Grouped-query attention gets one A and one B per KV group. On rotary models and
under QK-norm, A is cut down to the architecture's gauge group (:func:`benchmark.anatomy.within`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmark.anatomy import (
    AttentionBlock,
    Channels,
    MLPBlock,
    apply_qk,
    apply_vo,
    permute_units,
    within,
)
from benchmark.anatomy.nest import best, shuffled
from benchmark.api.contracts import Victim
from benchmark.core.state import State
from defenses import draws
from defenses.adapter_only import AdapterOnly

Sampling = Literal["uniform", "log_uniform", "beta"]


@dataclass(frozen=True)
class Rearrangement(AdapterOnly):
    """Permute hidden units (and channels) away from the base, scale heads.

    Attributes: that of :class:`defenses.adapter_only.AdapterOnly`, and
        perm: ``lap_max`` (greatest distance to the base), ``random``, or ``identity`` (none).
        scaling: which matrices A and B are drawn (see the module), or ``none``.
        sampling: law of the factors; None: ``uniform`` for diagonal, else ``log_uniform``.
            ``beta`` is low + (high − low)·Beta(½, ½).
        low: least factor; None: 0.05 (0.1 for nonsymmetric).
        high: greatest factor; None: 20 (15 for nonsymmetric).
        tied: B = A, as in the official code today.
    """

    perm: Literal["lap_max", "random", "identity"] = "lap_max"
    scaling: Literal["diagonal", "symmetric", "nonsymmetric", "none"] = "diagonal"
    sampling: Sampling | None = None
    low: float | None = None
    high: float | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 < low < high < math.inf:
            raise ValueError(f"need 0 < low < high, got low={low}, high={high}")
        super().__post_init__()

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest factor, the variant's own where not given."""
        low, high = (0.1, 15.0) if self.scaling == "nonsymmetric" else (0.05, 20.0)
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    def rearranged(self, victim: Victim, rng: torch.Generator) -> State:
        """``victim.expert`` with both operations applied: the same function, in other weights.

        With ``adapter_only`` applied to its update alone, and the function is another.

        Raises:
            MethodError: scaling alone, on a model without attention.
        """
        anatomy, attention = victim.anatomy, victim.anatomy.attention
        if self.perm == "identity" and self.scaling != "none":
            attention = anatomy.attended("scaling without a permutation")

        def lock(state: State) -> None:
            if self.perm != "identity":
                for units in anatomy.units:
                    permute_units(state, units, self._permutation(victim, units, rng))
            if self.scaling != "none":
                for block in attention:
                    device = state[block.q.weight.key].device
                    a = self._matrices(block, rng).to(device)
                    b = a if self.tied else self._matrices(block, rng).to(device)
                    apply_qk(state, block, within(block, a))
                    apply_vo(state, block, b)

        return self.locked(victim.expert, victim.base, lock)

    def _permutation(
        self, victim: Victim, block: MLPBlock | Channels, rng: torch.Generator
    ) -> Tensor:
        if self.perm == "random":
            return shuffled(block.width(victim.expert), block.nest, rng)
        cost = block.read_units(victim.base) @ block.read_units(victim.expert).T
        return best(-cost, block.nest)

    def _matrices(self, block: AttentionBlock, rng: torch.Generator) -> Tensor:
        """One matrix per KV group: (kv_heads, dh, dh)."""
        heads, size = block.kv_heads, block.head_dim
        factors = self._factors((heads, size), rng)
        if self.scaling == "diagonal":
            return torch.diag_embed(factors)
        if self.scaling == "symmetric":
            u = draws.orthogonal(heads, size, rng)
            return u * factors[:, None, :] @ u.mT
        mixed = draws.gaussian((heads, size, size), rng) + 1e-3 * torch.eye(size)
        return mixed * factors[:, None, :]

    def _factors(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        low, high = self.range
        law = self.sampling or ("uniform" if self.scaling == "diagonal" else "log_uniform")
        if law == "log_uniform":
            return draws.log_uniform(shape, low, high, rng)
        share = draws.uniform(shape, rng)
        if law == "beta":
            share = torch.sin(0.5 * math.pi * share).square()  # the arcsine law is Beta(½, ½)
        return low + (high - low) * share
