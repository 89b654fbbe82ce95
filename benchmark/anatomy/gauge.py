"""Transforms that keep the function (METHODS section 1): the gauge groups, applied to a State.

Each function edits ``state``, a *shallow copy* the caller made (``dict(released)``): tensors are
replaced, never written to. Computed in float64, cast at the end.

    Q → A·Q, K → A^-T·K        attention logits qᵀk unchanged
    V → B·V, O → O·B^-1        head outputs unchanged
    W1 → W1[π], W2 → W2[:, π]  hidden units renamed
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmark.anatomy.blocks import Anatomy, AttentionBlock, MLPBlock
from benchmark.checkpoint import State
from benchmark.errors import MethodError


def apply_qk(state: State, block: AttentionBlock, a: Tensor) -> None:
    """Q → A·Q and K → A^-T·K per KV head, biases too. ``a``: (kv_heads, dh, dh), invertible.

    The caller answers for A being in ``block.qk_gauge``.
    """
    a = a.double()
    q = block.read(state, "q")
    heads = q.reshape(block.kv_heads, block.group, block.head_dim, -1)
    block.write(state, "q", (a[:, None] @ heads).reshape(q.shape))
    # Solving beats inverting: cond(A) up to 1e4 would otherwise be paid twice.
    block.write(state, "k", torch.linalg.solve(a.mT, block.read(state, "k")))


def apply_vo(state: State, block: AttentionBlock, b: Tensor) -> None:
    """V → B·V (bias too) and O → O·B^-1 per KV head. ``b``: (kv_heads, dh, dh), invertible."""
    b = b.double()
    block.write(state, "v", b @ block.read(state, "v"))
    block.write_o(state, torch.linalg.solve(b[:, None], block.read_o(state), left=False))


def permute_units(state: State, block: MLPBlock, permutation: Tensor) -> None:
    """Hidden unit i becomes the old unit ``permutation[i]``. ``permutation``: (n,) int64."""
    permutation = permutation.to(state[block.up.weight.key].device)
    for slot in block.rows():
        slot.write(state, slot.read(state)[permutation])
    down = block.down.weight
    down.write(state, down.read(state)[:, permutation])


def permute_heads(state: State, block: AttentionBlock, permutation: Tensor) -> None:
    """KV group i (its query heads and O columns with it) becomes the old ``permutation[i]``."""
    permutation = permutation.to(state[block.o.weight.key].device)
    for name in ("q", "k", "v"):
        block.write(state, name, block.read(state, name)[permutation])
    block.write_o(state, block.read_o(state)[permutation])


def require_general(anatomy: Anatomy, method: str) -> None:
    """Refuse an architecture in which a general A on Q and K would change the function.

    Raises:
        MethodError: rotary embeddings or QK-norm (METHODS section 1).
    """
    for block in anatomy.attention:
        if block.qk_gauge != "general":
            raise MethodError(
                f"{method} multiplies Q and K by general matrices, which changes the function of "
                f"{anatomy.family} (its Q/K gauge is {block.qk_gauge}); use another method there"
            )
