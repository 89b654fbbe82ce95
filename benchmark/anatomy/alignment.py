"""Estimators that attacks share: the unit, head and gauge that bring a State to an anchor.

Each compares one block of a State with the same block of an anchor (base or partner) and returns
the transform to apply with :mod:`benchmark.anatomy.gauge`. Float64 on the State's device unless
noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from benchmark.anatomy.assignment import assign
from benchmark.anatomy.blocks import AttentionBlock, Channels, MLPBlock
from benchmark.anatomy.coupled import match_coupled
from benchmark.anatomy.gauge import joined, permute_units, rotary_matrix, within
from benchmark.anatomy.nest import nearest
from benchmark.anatomy.whole import Anatomy
from benchmark.core.state import State

Cost = Literal["inner", "cosine"]

# Far below any fine-tuning step, far above float64 rounding: keeps empty heads solvable.
_RIDGE = 1e-14


def align_units(
    state: State, anchor: Mapping[str, Tensor], anatomy: Anatomy, cost: Cost = "inner"
) -> None:
    """Rename all hidden units and channels to the anchor's; edits ``state``, a shallow copy."""
    for units, order in zip(anatomy.units, match_all(anatomy, state, anchor, cost), strict=True):
        permute_units(state, units, order)


def match_all(
    anatomy: Anatomy,
    state: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    cost: Cost = "inner",
) -> list[Tensor]:
    """The permutation for ``permute_units`` of each of ``anatomy.units``.

    Hidden units of a transformer share no tensor, so :func:`match_units` answers for each. Channels
    of convolutions do: see :mod:`benchmark.anatomy.coupled`.
    """
    if anatomy.channels:
        return match_coupled(anatomy.units, state, anchor, cost)
    return [match_units(mlp, state, anchor, cost) for mlp in anatomy.mlp]


def match_units(
    block: MLPBlock | Channels,
    state: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    cost: Cost = "inner",
) -> Tensor:
    """The permutation for ``permute_units`` that brings the hidden units to the anchor's: (n,).

    Maximises Σ_i C[i, π(i)] over permutations π (a linear assignment problem, as in Git Re-Basin,
    arXiv 2209.04836). C[i, j] compares unit i of the anchor with unit j of the state:

    - ``inner``: ⟨W1_0[i], W1[j]⟩ + b1_0[i]·b1[j] + ⟨W2_0[:, i], W2[:, j]⟩ (METHODS 2.1);
    - ``cosine``: the cosine of the rows W1_0[i] and W1[j].
    """

    def units(source: Mapping[str, Tensor]) -> Tensor:
        # float32 halves the time of the product below, and a matching needs no more digits.
        if cost == "inner":
            return block.read_units(source, torch.float32)
        return torch.nn.functional.normalize(block.read_rows(source).float(), dim=1)

    return nearest(units(state), units(anchor), block.nest)


def match_heads(
    block: AttentionBlock, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """The permutation for ``permute_heads`` that brings the KV groups to the anchor's: (kv_heads,).

    Maximises the summed cosines of what no gauge changes: the products WqᵀWk (query bias included,
    key bias left out: softmax ignores it) and Wo·Wv (value bias included) of each head, of a
    group's query heads in their best order. Heads that cannot trade places stay.
    """
    if block.fixed_heads:
        return torch.arange(block.kv_heads)
    scores = _head_cosines(block, state, anchor)
    if block.group == 1:
        return assign(scores[:, :, 0, 0])
    rows = torch.arange(block.group)
    best = [[score[rows, assign(score)].sum() for score in row] for row in scores.cpu()]
    return assign(torch.stack([torch.stack(row) for row in best]))


def match_queries(
    block: AttentionBlock, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """The order for ``permute_queries`` that brings the query heads of each KV group, matched
    already, to the anchor's: (kv_heads, group)."""
    scores = _head_cosines(block, state, anchor).diagonal().permute(2, 0, 1)
    return torch.stack([assign(score) for score in scores])


def qk_gauge(
    block: AttentionBlock, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """The A for ``apply_qk`` that brings Q and K nearest to the anchor's: (kv_heads, dh, dh).

    In the block's own gauge group: general, rotary or sign (:func:`benchmark.anatomy.within`).
    """
    x, y = head_sides(block, state, "qk")
    x0, y0 = head_sides(block, anchor, "qk")
    if block.qk_gauge == "general":
        return tied_gauge(x, x0, y, y0)
    if block.qk_gauge == "rotary":
        order = block.order.to(x.device)
        turning, rest = zip(
            *(side[:, order].tensor_split([block.turning], 1) for side in (x, x0, y, y0)),
            strict=True,
        )
        free = tied_gauge(*rest) if rest[0].shape[1] else x.new_zeros(len(x), 0, 0)
        return joined(block, rotary_gauge(*turning), free)
    # A sign per dimension or per pair: that of the inner products with the anchor.
    return within(block, torch.diag_embed((x * x0).sum(2) + (y * y0).sum(2)))


def vo_gauge(
    block: AttentionBlock, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """The B for ``apply_vo`` that brings V and O nearest to the anchor's: (kv_heads, dh, dh)."""
    x, y = head_sides(block, state, "vo")
    x0, y0 = head_sides(block, anchor, "vo")
    return tied_gauge(x, x0, y, y0)


def head_sides(
    block: AttentionBlock, state: Mapping[str, Tensor], part: Literal["qk", "vo"]
) -> tuple[Tensor, Tensor]:
    """The two sides of what a head's gauge cancels in: (kv_heads, dh, m) and (kv_heads, dh, n).

    ``qk``: the group's query rows with biases, and its key rows (biases too unless those are free);
    ``vo``: value rows with biases, and the group's output columns. XᵀY is the invariant.
    """
    if part == "qk":
        return _flat(_queries(block, state)), _flat(_keys(block, state))
    return _flat(_values(block, state)), _flat(_outputs(block, state))


def write_sides(
    state: State, block: AttentionBlock, part: Literal["qk", "vo"], x: Tensor, y: Tensor
) -> None:
    """The inverse of :func:`head_sides`; edits ``state``, a shallow copy. A free key bias stays."""
    first = x.unflatten(2, (block.group if part == "qk" else 1, -1)).transpose(1, 2).flatten(1, 2)
    block.write(state, "q" if part == "qk" else "v", first)
    if part == "vo":
        block.write_o(state, y.unflatten(2, (block.group, -1)).transpose(1, 2).mT)
    elif block.free_key_bias:
        block.write(state, "k", torch.cat([y, block.read(state, "k")[..., -1:]], 2))
    else:
        y = y.clone()
        free = block.free_rows.to(y.device)
        y[:, free, -1] = block.read(state, "k")[:, free, -1]
        block.write(state, "k", y)


def tied_gauge(
    first: Tensor,
    first0: Tensor,
    second: Tensor,
    second0: Tensor,
    iterations: int = 20,
    tolerance: float = 1e-4,
) -> Tensor:
    """M per head that minimises ‖M·X − X0‖² + ‖M^-T·Y − Y0‖².

    Starts from the best of the identity, the least-squares fit on X alone and the inverse transpose
    of the one on Y; then Gauss–Newton on M ← (I + Δ)·M, where Δ solves the Sylvester equation

        Δ·X1X1ᵀ + Y1Y1ᵀ·Δ = (X0 − X1)·X1ᵀ + Y1·(Y1 − Y0)ᵀ,   X1 = M·X,  Y1 = M^-T·Y,

    with the step of each head halved until its objective falls. So no head ends farther from its
    anchor than it was; a head that gains nothing keeps the identity.

    Args:
        first: X, (heads, dh, m) float64; ``first0`` its anchor.
        second: Y, (heads, dh, n) float64; ``second0`` its anchor.
        iterations: at most this many Gauss–Newton steps.
        tolerance: a head is done when its objective falls by a smaller fraction.

    Returns:
        (heads, dh, dh) float64, invertible.
    """
    eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    identity = eye.expand(len(first), -1, -1)
    on_second = fit(second, second0)
    starts = torch.stack([identity, fit(first, first0), _inverse_transpose(on_second)])
    values = torch.stack([_objective(m, first, first0, second, second0) for m in starts])
    best = values.argmin(0)
    heads = torch.arange(len(first), device=first.device)
    m, value = starts[best, heads], values[best, heads]
    x, y = m @ first, _inverse_transpose(m) @ second

    active = torch.ones_like(value, dtype=torch.bool)
    for _ in range(iterations):
        right = (first0 - x) @ x.mT + y @ (y - second0).mT
        delta = _sylvester(x @ x.mT, y @ y.mT, right)
        step = active.to(value.dtype)
        fallen = torch.zeros_like(active)
        for _ in range(10):
            change = eye + step[:, None, None] * delta
            fresh_x, fresh_y = change @ x, _inverse_transpose(change) @ y
            fresh = _residual(fresh_x, first0) + _residual(fresh_y, second0)
            fallen = fresh < value
            if bool((fallen | ~active).all()):
                break
            step = torch.where(fallen, step, step / 2)
        take = (fallen & active)[:, None, None]
        m = torch.where(take, change @ m, m)
        x, y = torch.where(take, fresh_x, x), torch.where(take, fresh_y, y)
        gained = value - torch.where(take[:, 0, 0], fresh, value)
        active = active & (gained > tolerance * value)
        value = value - gained
        if not bool(active.any()):
            break
    return m


def rotary_gauge(first: Tensor, first0: Tensor, second: Tensor, second0: Tensor) -> Tensor:
    """A per head that minimises ‖A·X − X0‖² + ‖A^-T·Y − Y0‖² among one complex number per pair.

    With rows i and i + dh/2 as one complex row x, and z = r·e^{iφ} in place of A: for each r the
    best φ turns c = r·⟨x, x0⟩ + ⟨y, y0⟩/r to the real axis, which leaves one dimension to search,

        f(r) = r²·‖x‖² + ‖y‖²/r² − 2·|c(r)|.

    Shapes and dtypes as in :func:`tied_gauge`; a pair that gains nothing keeps the identity.
    """
    half = first.shape[1] // 2
    x, x0, y, y0 = (
        torch.complex(side[:, :half], side[:, half:]) for side in (first, first0, second, second0)
    )
    on_x, on_y = ((side * anchor.conj()).sum(2) for side, anchor in ((x, x0), (y, y0)))
    xx, yy = (side.abs().square().sum(2) for side in (x, y))
    z = best_factors(xx, yy, on_x, on_y)
    return rotary_matrix(z.real, z.imag)


def common_scale(x: Tensor, x0: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """The r > 0 per head that minimises ‖r·X − X0‖² + ‖Y/r − Y0‖²; sides (heads, dh, m): (heads,).

    A head that gains nothing keeps 1.
    """
    on_x, on_y = ((side * anchor).sum((1, 2)).clamp(min=0) for side, anchor in ((x, x0), (y, y0)))
    return best_factors(x.square().sum((1, 2)), y.square().sum((1, 2)), on_x, on_y)


def best_factors(xx: Tensor, yy: Tensor, on_x: Tensor, on_y: Tensor) -> Tensor:
    """z = r·u, |u| = 1, minimising ‖z·x − x0‖² + ‖y/z̄ − y0‖² elementwise; 1 where nothing is won.

    ``on_x`` = ⟨x, x0⟩ and ``on_y`` likewise, real or complex; ``xx`` = ‖x‖², ``yy`` = ‖y‖².
    """

    def objective(log_r: Tensor) -> Tensor:
        r = log_r.exp()
        return r**2 * xx + yy / r**2 - 2 * (r * on_x + on_y / r).abs()

    best, step = torch.zeros_like(xx), 12.0
    grid = torch.linspace(-1, 1, 41, dtype=xx.dtype, device=xx.device)
    grid = grid.reshape(-1, *[1] * xx.ndim)
    for _ in range(12):  # each round narrows the bracket twentyfold, to 1e-14 of the radius
        tried = best + step * grid
        best = tried.gather(0, objective(tried).argmin(0)[None])[0]
        step /= 20
    r = best.exp()
    c = r * on_x + on_y / r
    turn = c.conj() / c.abs().clamp_min(torch.finfo(xx.dtype).tiny)
    gains = objective(best) < xx + yy - 2 * (on_x + on_y).real
    return torch.where(gains & (c.abs() > 0), r * turn, torch.ones_like(turn))


def _queries(block: AttentionBlock, state: Mapping[str, Tensor]) -> Tensor:
    """Query rows and biases: (kv_heads, group, dh, d + 1)."""
    value = block.read(state, "q")
    return value.reshape(block.kv_heads, block.group, block.head_dim, -1)


def _keys(block: AttentionBlock, state: Mapping[str, Tensor]) -> Tensor:
    """Key rows, without their bias where that is a gauge of its own: (kv_heads, 1, dh, m)."""
    keys = block.read(state, "k")[:, None]
    keys[:, :, block.free_rows.to(keys.device), -1] = 0
    return keys[..., :-1] if block.free_key_bias else keys


def _values(block: AttentionBlock, state: Mapping[str, Tensor]) -> Tensor:
    """Value rows and biases: (kv_heads, 1, dh, d + 1)."""
    return block.read(state, "v")[:, None]


def _outputs(block: AttentionBlock, state: Mapping[str, Tensor]) -> Tensor:
    """Output columns: (kv_heads, group, dh, d)."""
    return block.read_o(state).mT


def _flat(value: Tensor) -> Tensor:
    """(kv_heads, group, dh, m) → (kv_heads, dh, group·m): one gauge acts on the whole group."""
    return value.transpose(1, 2).flatten(2)


def _head_cosines(
    block: AttentionBlock, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """How alike query head i of anchor group a and j of group b are: (a, b, i, j)."""
    queries, keys, values, outputs = (
        (side(block, state), side(block, anchor)) for side in (_queries, _keys, _values, _outputs)
    )
    return _product_cosine(queries, keys) + _product_cosine(values, outputs)


def _product_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """cos(X0_aiᵀY0_ai, X_bjᵀY_bj) for heads i of anchor group a, j of group b: (a, b, i, j).

    Sides are (kv_heads, group or 1, dh, m). ⟨X0ᵀY0, XᵀY⟩ = Σ_ef (X0Xᵀ)_ef·(Y0Yᵀ)_ef: Gram matrices
    of side dh, never a d × d product.
    """

    def gram(side: tuple[Tensor, Tensor]) -> Tensor:
        """X0_ai·X_bjᵀ: (a, b, i, j, dh, dh)."""
        own, anchor = side
        flat = anchor.flatten(0, 2) @ own.flatten(0, 2).mT
        return flat.reshape(*anchor.shape[:3], *own.shape[:3]).permute(0, 3, 1, 4, 2, 5)

    def squared_norm(which: int) -> Tensor:
        """‖XᵀY‖² of each head: (kv_heads, group)."""
        x, y = first[which], second[which]
        return ((x @ x.mT) * (y @ y.mT)).sum((2, 3))

    inner = (gram(first) * gram(second)).sum((4, 5))
    squares = squared_norm(1)[:, None, :, None] * squared_norm(0)[None, :, None, :]
    return inner / squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)


def fit(x: Tensor, x0: Tensor) -> Tensor:
    """argmin_T ‖T·X − X0‖ = X0Xᵀ(XXᵀ)^-1 per head, with a ridge far below the data's scale."""
    gram = x @ x.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(x.dtype).tiny)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve_ex(gram + _RIDGE * scale[:, None, None] * eye, x0 @ x.mT, left=False)[
        0
    ]


def _inverse_transpose(m: Tensor) -> Tensor:
    """M^-T per head; a singular M gives non-finite numbers, never an exception."""
    return torch.linalg.inv_ex(m)[0].mT


def _residual(x: Tensor, x0: Tensor) -> Tensor:
    return (x - x0).square().sum((1, 2))


def _objective(m: Tensor, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """The objective per head; a singular or non-finite M is worst."""
    value = _residual(m @ x, x0) + _residual(_inverse_transpose(m) @ y, y0)
    return value.nan_to_num(nan=float("inf"))


def _sylvester(g: Tensor, h: Tensor, right: Tensor) -> Tensor:
    """Δ with Δ·G + H·Δ = R for symmetric positive semi-definite G and H."""
    a, u = torch.linalg.eigh(g)
    b, w = torch.linalg.eigh(h)
    spectrum = b[:, :, None] + a[:, None, :]
    floor = _RIDGE * spectrum.amax((1, 2), keepdim=True) + torch.finfo(g.dtype).tiny
    return w @ ((w.mT @ right @ u) / (spectrum + floor)) @ u.mT
