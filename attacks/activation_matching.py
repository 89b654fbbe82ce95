"""Activation matching: align hidden units and value heads by what they do on data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import apply_vo, permute_heads, permute_units, taps
from benchmark.anatomy.alignment import match_heads
from benchmark.anatomy.assignment import assign
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class ActivationMatching(Attack):
    """On unlabelled inputs, with h the inputs of each MLP's ``down`` and z those of each ``o``:

        π = argmax_π Σ_i corr(h0_i, h_π(i)),          units ← units[π]
        B = argmin_B ‖B·z − z0‖² per head (ridge),     Wv ← B·Wv,  Wo ← Wo·B^-1

    0 marks the base. Heads are matched by their invariants first. Q and K never show on their own
    and stay; compose with gauge-align for them. Function-preserving.
    """

    card: ClassVar[Card] = Card(
        summary="match hidden units by activation correlation, value heads by least squares",
        paper="Git Re-Basin: Merging Models modulo Permutation Symmetries (activation matching)",
        authors="Ainsworth, Hayase, Srinivasa",
        arxiv="2209.04836",
        fidelity="ours",
        exact=True,
        notes="the paper's matching of units; the least squares on value heads is ours",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 64
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.per_task < 1 or not self.ridge > 0:
            raise ValueError("need per_task >= 1 and ridge > 0")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        state, base, anatomy = dict(released), knowledge.base, knowledge.anatomy
        for block in anatomy.attention:
            permute_heads(state, block, match_heads(block, state, base))
        inputs = knowledge.unlabeled(self.per_task, rng)
        watched = [
            key
            for key in (
                *(mlp.down.weight.key for mlp in anatomy.mlp),
                *(block.o.weight.key for block in anatomy.attention),
            )
            if taps.watchable(knowledge.module, key)
        ]
        seen = []
        for model in (state, base):
            with taps.record(knowledge.module, watched) as record, torch.no_grad():
                for batch in inputs.values():
                    knowledge.features(model, batch)
            seen.append(record)
        own, reference = seen
        for mlp in anatomy.mlp:
            key = mlp.down.weight.key
            permute_units(state, mlp, assign(_correlation(reference[key], own[key])))
        for block in anatomy.attention:
            if (key := block.o.weight.key) in own:
                z, z0 = (r[key].double().unflatten(1, (block.heads, -1)) for r in (own, reference))
                apply_vo(state, block, self._fit(z, z0, block.group))
        return state

    def _fit(self, z: Tensor, z0: Tensor, group: int) -> Tensor:
        """B per KV group from (rows, heads, dh): (kv_heads, dh, dh)."""
        z, z0 = (x.unflatten(1, (-1, group)).permute(1, 3, 0, 2).flatten(2) for x in (z, z0))
        gram = z @ z.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + self.ridge * scale * eye, z0 @ z.mT, left=False)


def _correlation(reference: Tensor, own: Tensor) -> Tensor:
    """corr(reference_i, own_j) over rows: (n, n)."""
    a, b = (x.float() - x.float().mean(0) for x in (reference, own))
    a, b = (torch.nn.functional.normalize(x, dim=0) for x in (a, b))
    return a.T @ b
