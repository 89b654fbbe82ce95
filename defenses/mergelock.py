"""MergeLock: secret invertible matrices inside attention (arXiv 2509.01548).

Post-hoc, without data. Per head and layer, with independent invertible A and B::

    Wq → A·Wq, Wk → A^-T·Wk, Wv → B·Wv, Wo → Wo·B^-1        (biases of q, k, v likewise)

The paper composes A and B of random, scaling and permutation factors; its sampling law is not
published. Reconstruction: A = G·D·Π, G Gaussian, D = diag(s) with s log-uniform on [0.1, 10], Π a
random permutation, redrawn until cond(A) ≤ 30·dh (one draw in four to eight passes at dh = 32 to
128). The bound is on A, not on G alone: stored in float32 a lock loses up to cond(A) · 6e-8 of the
logits; a fixed 1e4 cost tiny heads up to 6e-4. On rotary models and under QK-norm, A is cut down to
the architecture's gauge group (:func:`benchmark.anatomy.within`), and where a part of each head is
not rotated the bound is on what is left of A there too. The MLP is untouched. The random state is
the key: :meth:`MergeLock.unlock` replays the draws and inverts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, AttentionBlock, apply_qk, apply_vo, within
from benchmark.anatomy.gauge import parted
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State
from defenses import draws
from defenses.adapter_only import AdapterOnly

_WORST_CONDITION = 30  # times the head's dimension


@dataclass(frozen=True)
class MergeLock(AdapterOnly, Defense):
    """Lock Q/K and V/O of every head.

    Attributes: that of :class:`defenses.adapter_only.AdapterOnly`, and
        kind: ``full`` G·D·Π; ablations ``orthogonal`` (Haar) and ``gaussian`` (G alone).
    """

    kind: Literal["full", "orthogonal", "gaussian"] = "full"

    card: ClassVar[Card] = Card(
        summary="Multiplies Q/K and V/O of every head by secret invertible matrices",
        paper="Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing",
        authors="Zihao Wang, Enneng Yang, Lu Yin, Shiwei Liu, Li Shen",
        arxiv="2509.01548",
        fidelity="reconstruction",
        exact=True,
        locks=True,
        architectures="any; on rotary models and with QK-norm only that part of A which keeps Q·K",
        notes="the sampling law of A and B is not published; A = G·D·Π is ours",
    )

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State.

        Raises:
            MethodError: the model has no attention.
        """
        expert, anatomy = victim.expert, victim.anatomy
        return self._transform(expert, anatomy, rng, victim.base, inverse=False)

    def unlock(
        self, released: State, anatomy: Anatomy, rng: torch.Generator, base: State | None = None
    ) -> State:
        """The expert again, up to rounding. ``rng`` must be in the state it had when locking.

        ``base``: needed with ``adapter_only``.
        """
        return self._transform(released, anatomy, rng, base, inverse=True)

    def _transform(
        self,
        state: State,
        anatomy: Anatomy,
        rng: torch.Generator,
        base: State | None,
        *,
        inverse: bool,
    ) -> State:
        def lock(out: State) -> None:
            for block in anatomy.attended("mergelock"):
                device = out[block.q.weight.key].device
                a, b = (self._matrices(block, rng).to(device) for _ in range(2))
                for apply, matrices in ((apply_qk, within(block, a)), (apply_vo, b)):
                    apply(out, block, torch.linalg.inv(matrices) if inverse else matrices)

        return self.locked(state, base, lock)

    def _matrices(self, block: AttentionBlock, rng: torch.Generator) -> Tensor:
        """One matrix per KV group: (kv_heads, dh, dh)."""
        heads, size = block.kv_heads, block.head_dim
        if self.kind == "orthogonal":
            return draws.orthogonal(heads, size, rng)
        return torch.stack([self._matrix(block, rng) for _ in range(heads)])

    def _matrix(self, block: AttentionBlock, rng: torch.Generator) -> Tensor:
        size = block.head_dim
        while True:
            a = draws.gaussian((size, size), rng)
            if self.kind == "full":
                a = a * draws.log_uniform((1, size), 0.1, 10.0, rng)
                a = a[:, torch.randperm(size, generator=rng)]
            _, free = parted(block, a[None])
            parts = (part for part in (a, *free) if len(part))
            if all(torch.linalg.cond(part) <= _WORST_CONDITION * len(part) for part in parts):
                return a
