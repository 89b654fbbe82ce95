"""Head normalisation: undo per-dimension and per-head scalings from row norms alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, AttentionBlock, apply_qk, apply_vo, within
from benchmark.api.contracts import Access, Attack, Card, Knowledge, Members
from benchmark.core.state import State


@dataclass(frozen=True)
class HeadNorm(Attack):
    """q_i ← q_i/α_i, k_i ← α_i·k_i with α_i² = (‖q'_i‖ / ‖k'_i‖) / (‖q0_i‖ / ‖k0_i‖).

    i runs over the dimensions of every head. Likewise β for V and O. ``reference=balanced``
    takes 1 in place of the base's ratio, for *every* member of the merge, base included, so that it
    needs no trust in an anchor. ``granularity=head`` uses one factor per head. Scalings keep the
    function (of Q and K: as far as the architecture's gauge group has them).
    """

    card: ClassVar[Card] = Card(
        summary="renormalise each dimension or head of Q against K and of V against O",
        fidelity="ours",
        exact=True,
        notes="answers diagonal scalings (PaRaMS) only",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    reference: Literal["base", "balanced"] = "base"
    granularity: Literal["dimension", "head"] = "dimension"

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return self._rescale(released, knowledge.anatomy, knowledge.base)

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        if self.reference == "base":
            return super().members(released, knowledge, rng)
        everyone = (knowledge.base, released, *knowledge.partners)
        base, victim, *partners = (self._rescale(s, knowledge.anatomy, s) for s in everyone)
        return Members(base, victim, tuple(partners))

    def _rescale(self, state: State, anatomy: Anatomy, base: State) -> State:
        out = dict(state)
        for block in anatomy.attention:
            for read, apply in ((_query_key, _apply_qk), (_value_output, apply_vo)):
                factor = self._ratio(*read(block, state))
                if self.reference == "base":
                    factor = factor / self._ratio(*read(block, base))
                # A dead dimension has no scale to restore.
                factor = torch.where((factor > 0) & factor.isfinite(), factor, 1.0)
                apply(out, block, torch.diag_embed(factor.rsqrt()))
        return out

    def _ratio(self, first: Tensor, second: Tensor) -> Tensor:
        """‖first_i‖ / ‖second_i‖ for (kv_heads, dh, m): (kv_heads, dh)."""
        norms = [x.square().sum(-1) for x in (first, second)]
        if self.granularity == "head":
            norms = [n.sum(-1, keepdim=True).expand_as(n) for n in norms]
        return (norms[0] / norms[1]).sqrt()


def _apply_qk(state: State, block: AttentionBlock, scales: Tensor) -> None:
    apply_qk(state, block, within(block, scales))


def _query_key(block: AttentionBlock, state: State) -> tuple[Tensor, Tensor]:
    q = block.read(state, "q").reshape(block.kv_heads, block.group, block.head_dim, -1)
    # The key bias may hold anything: softmax ignores it.
    return q.transpose(1, 2).flatten(2), block.read(state, "k")[..., :-1]


def _value_output(block: AttentionBlock, state: State) -> tuple[Tensor, Tensor]:
    return block.read(state, "v"), block.read_o(state).mT.transpose(1, 2).flatten(2)
