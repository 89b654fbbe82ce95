"""Rotation matching: turn every head back by an orthogonal Procrustes fit, rename hidden units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import AttentionBlock, apply_qk, apply_vo, within
from benchmark.anatomy.alignment import align_units, common_scale, head_sides
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.state import State


@dataclass(frozen=True)
class RotationMatch(Attack):
    """Per head, one rotation for Q and K, and one for V and O, biases included:

        R = argmax_R tr(Rᵀ·C) = U·Vᵀ,  C = Wq0·Wqᵀ + Wk0·Wkᵀ = U·S·Vᵀ,  Wq ← R·Wq, Wk ← R·Wk,

    and with C = Wv0·Wvᵀ + Wo0ᵀ·Wo likewise Wv ← R·Wv, Wo ← Wo·Rᵀ. Hidden units are matched by all
    their weights (Git Re-Basin). ``rescale`` goes on with one factor per head,

        argmin_r ‖r·Wq − Wq0‖² + ‖Wk/r − Wk0‖²,  r > 0.

    Under rotary embeddings or QK-norm C is cut down to the gauge group first, where the same polar
    factor is the best rotation or sign of each pair: the function always stays.
    """

    card: ClassVar[Card] = Card(
        summary="turn every head to the base by orthogonal Procrustes and match hidden units",
        paper="Beyond the Permutation Symmetry of Transformers: The Role of Rotation for Model "
        "Fusion",
        arxiv="2502.00264",
        fidelity="reconstruction",
        exact=True,
        notes="C and the matching of units as in the authors' code, whose bias term does not fit "
        "its own heads: read as each head's biases; a key bias that softmax ignores is left out of "
        "C. Its anchor is the member nearest to the mean, here the base. rescale is our reading; "
        "so are the gauge groups of rotary embeddings and QK-norm. No match for scalings and "
        "general matrices: see gauge-align",
    )
    access: ClassVar[Access] = Access.WEIGHTS

    rescale: bool = False

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, state = knowledge.base, dict(released)
        for block in knowledge.anatomy.attention:
            apply_qk(state, block, self._gauge(block, state, base, "qk"))
            apply_vo(state, block, self._gauge(block, state, base, "vo"))
        align_units(state, base, knowledge.anatomy)
        return state

    def _gauge(
        self, block: AttentionBlock, state: State, base: State, part: Literal["qk", "vo"]
    ) -> Tensor:
        """What to apply to a head: a rotation, times a factor if asked: (kv_heads, dh, dh)."""
        x, y = head_sides(block, state, part)
        x0, y0 = head_sides(block, base, part)
        cross = x0 @ x.mT + y0 @ y.mT
        turn = polar(within(block, cross) if part == "qk" else cross)
        # The norms that QK-norm divides out leave no factor free.
        if not self.rescale or (part == "qk" and block.qk_norm is not None):
            return turn
        return common_scale(turn @ x, x0, turn @ y, y0)[:, None, None] * turn


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ of U·S·Vᵀ for each matrix (n, dh, dh); a direction of C = 0 stays as it is."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    scale = torch.linalg.matrix_norm(matrix)[:, None, None] + torch.finfo(matrix.dtype).tiny
    u, _, v = torch.linalg.svd(matrix + 1e-12 * scale * eye)
    return u @ v
