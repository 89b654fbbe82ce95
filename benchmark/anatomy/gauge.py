"""Transforms that keep the function (METHODS section 1): the gauge groups, applied to a State.

Each function edits ``state``, a *shallow copy* the caller made (``dict(released)``): tensors are
replaced, never written to. Computed in float64, cast at the end.

    Q → A·Q, K → A^-T·K        attention logits qᵀk unchanged
    V → B·V, O → O·B^-1        head outputs unchanged
    W1 → W1[π], W2 → W2[:, π]  hidden units (or channels) renamed
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Channels, MLPBlock
from benchmark.core.state import State


def apply_qk(state: State, block: AttentionBlock, a: Tensor) -> None:
    """Q → A·Q and K → A^-T·K per KV head, biases too. ``a``: (kv_heads, dh, dh), invertible.

    The caller answers for A being in ``block.qk_gauge`` (:func:`within`).
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


def permute_units(state: State, block: MLPBlock | Channels, permutation: Tensor) -> None:
    """Unit i becomes the old unit ``permutation[i]``. ``permutation``: (n,) int64."""
    permutation = permutation.to(state[block.axes[0].slot.key].device)
    for axis in block.axes:
        axis.write(state, axis.read(state)[permutation])


def scale_units(state: State, block: MLPBlock | Channels, scale: Tensor) -> None:
    """Units × c, what reads them / c: up and down, or norm and next convolution. ``scale``: (n,).

    The caller answers for c being in ``block.unit_scale``.
    """
    c = scale.double()
    for axis in block.axes:
        if axis.power:
            value = axis.read(state).double()
            factor = c.reshape(-1, *[1] * (value.ndim - 1))
            axis.write(state, value * factor if axis.power > 0 else value / factor)


def permute_heads(state: State, block: AttentionBlock, permutation: Tensor) -> None:
    """KV group i (its query heads and O columns with it) becomes the old ``permutation[i]``."""
    permutation = permutation.to(state[block.o.weight.key].device)
    for name in ("q", "k", "v"):
        block.write(state, name, block.read(state, name)[permutation])
    block.write_o(state, block.read_o(state)[permutation])
    for gain in block.qk_norm or () if block.whole_norm else ():
        gain.write(state, gain.read(state).reshape(block.kv_heads, -1)[permutation].flatten())


def permute_queries(state: State, block: AttentionBlock, order: Tensor) -> None:
    """Query head g of KV group i (its O columns with it) becomes the old ``order[i, g]``.

    ``order``: (kv_heads, group) int64, for the groups keep their keys and values.
    """
    order = order.to(state[block.o.weight.key].device)
    groups = torch.arange(block.kv_heads, device=order.device)[:, None]
    q = block.read(state, "q")
    block.write(state, "q", q.unflatten(1, (block.group, -1))[groups, order].reshape(q.shape))
    block.write_o(state, block.read_o(state)[groups, order])
    if block.qk_norm is not None and block.whole_norm:
        gain = block.qk_norm[0].read(state).reshape(block.kv_heads, block.group, -1)
        block.qk_norm[0].write(state, gain[groups, order].flatten())


def within(block: AttentionBlock, a: Tensor) -> Tensor:
    """The part of A that keeps the function of this block: (kv_heads, dh, dh) → the same shape.

    The orthogonal projection (Frobenius norm) onto the matrices that commute with what the
    architecture does between the projections and the logits (METHODS section 1):

    - ``general``: nothing in between; A itself;
    - ``rotary``: the rotation of the pairs (i, j = i + dh/2, or i + 1 where they are interleaved),
      each by its own frequency, so that only one complex number x + iy per pair is left:
      x = (A_ii + A_jj)/2, y = (A_ji − A_ij)/2; and among rows that are not rotated A itself;
    - ``sign``: QK-norm, whose gain is one number per row, so that only a sign is left: of x per
      pair, or of A_ii per dimension where there is no rotation.
    """
    if block.qk_gauge == "general":
        return a
    turning, rest = parted(block, a)
    diagonal, half = turning.diagonal(dim1=1, dim2=2), block.turning // 2
    x = (diagonal[:, :half] + diagonal[:, half:]) / 2
    if block.qk_gauge == "sign":
        free = torch.diag_embed(_sign(rest.diagonal(dim1=1, dim2=2)))
        return joined(block, rotary_matrix(_sign(x), torch.zeros_like(x)), free)
    lower, upper = (turning.diagonal(offset, 1, 2) for offset in (-half, half))
    return joined(block, rotary_matrix(x, (lower - upper) / 2), rest)


def parted(block: AttentionBlock, a: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix per head the part among the rotated rows, in ``block.order``, and that among the
    others: (kv_heads, turning, turning) and (kv_heads, dh − turning, dh − turning)."""
    order = block.order.to(a.device)
    a = a[:, order][:, :, order]
    return a[:, : block.turning, : block.turning], a[:, block.turning :, block.turning :]


def joined(block: AttentionBlock, turning: Tensor, rest: Tensor) -> Tensor:
    """The inverse of :func:`parted`, zero elsewhere: (kv_heads, dh, dh)."""
    a = turning.new_zeros(len(turning), block.head_dim, block.head_dim)
    a[:, : block.turning, : block.turning] = turning
    a[:, block.turning :, block.turning :] = rest
    back = block.order.argsort().to(a.device)
    return a[:, back][:, :, back]


def rotary_matrix(x: Tensor, y: Tensor) -> Tensor:
    """Multiplication of every pair (i, i + dh/2) by x + iy: (heads, dh/2) → (heads, dh, dh)."""
    same, cross = torch.diag_embed(x), torch.diag_embed(y)
    return torch.cat([torch.cat([same, -cross], 2), torch.cat([cross, same], 2)], 1)


def _sign(value: Tensor) -> Tensor:
    """+1 or −1, never 0."""
    return torch.where(value < 0, -1.0, 1.0).to(value.dtype)
