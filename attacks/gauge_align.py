"""Gauge alignment: undo any lock of the gauge group without touching the function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class GaugeAlign(Attack):
    """The point nearest to the base among the models that compute the released function.

    Every gauge of the model (:mod:`benchmark.anatomy.gauges`), outer ones first: those of stream,
    norms and embeddings as in `residual-align`; heads by WqᵀWk and Wo·Wv; then for each head

        A = argmin ‖A·Wq − Wq0‖² + ‖A^-T·Wk − Wk0‖²,   Wq ← A·Wq,  Wk ← A^-T·Wk,
        B = argmin ‖B·Wv − Wv0‖² + ‖B^-T·Woᵀ − Wo0ᵀ‖²,  Wv ← B·Wv,  Wo ← Wo·B^-1,

    biases of q and v included. The key bias is set to the base's: it adds one number to all logits
    of a query, which softmax ignores. (Under rotary embeddings or QK-norm it stays, and A is one
    complex number or one sign per pair.) Hidden units and channels are matched, and scaled where a
    factor is free (gated MLPs, ReLU). No more is moved than brings the release nearer: an
    undefended expert stays as it is (:func:`benchmark.anatomy.gauges.align`).
    """

    card: ClassVar[Card] = Card(
        summary="align the whole gauge group with the base: stream, norms, heads, hidden units",
        fidelity="ours",
        exact=True,
        notes="one A for Q and K, one B for V and O (tied inverses), least-squares start and "
        "Gauss–Newton; answers every exact lock we know",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return align(released, knowledge.base, knowledge.anatomy)
