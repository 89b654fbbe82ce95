"""What a lock does inside attention heads, named by the simplest transform that explains it.

Per head the simplest one that explains the state nearly as well as the best one of the gauge group
does (METHODS section 1): one matrix per head in general, one complex number per frequency pair
under rotary embeddings, one sign under QK-norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from benchmark.anatomy.alignment import (
    head_sides,
    match_heads,
    qk_gauge,
    rotary_gauge,
    vo_gauge,
)
from benchmark.anatomy.blocks import AttentionBlock
from benchmark.anatomy.gauge import joined, parted, permute_heads, rotary_matrix
from benchmark.anatomy.whole import Anatomy

Kind = Literal[
    "none", "head permutation", "signs", "per-head scaling", "diagonal", "orthogonal", "rotary",
    "general",
]  # fmt: skip
#: From the simplest to the most general.
KINDS: tuple[Kind, ...] = (
    "none", "head permutation", "signs", "per-head scaling", "diagonal", "orthogonal", "rotary",
    "general",
)  # fmt: skip
Part = Literal["qk", "vo"]

#: A transform explains a head if it leaves at most so many times what the best one leaves. A random
#: τ loses dh/(2d) of its energy to the best, so the ratio is at most √2 for one that is no lock.
NEARLY = 1.5
#: A head that is this near to the base (relative) is explained whatever fits it better: fine-tuning
#: moves weights by about 1 to 5 %, every lock we know by more than 50 %.
NEAR = 0.05
#: A block has the most general kind that this share of its heads reaches: one odd head (pruned,
#: nearly empty) names no lock.
SHARE = 0.25


def head_locks(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], anatomy: Anatomy
) -> list[dict[Part, Kind]]:
    """The kind on Q and K and that on V and O of every attention block.

    Everything outside the heads must be where the base has it (:meth:`gauges.Group.meet`).
    """
    found: list[dict[Part, Kind]] = []
    for block in anatomy.attention:
        order = match_heads(block, state, base)
        astray = bool((order != torch.arange(len(order), device=order.device)).any())
        matched = dict(state)
        permute_heads(matched, block, order)
        parts: tuple[Part, ...] = ("qk", "vo")
        kinds = {part: _kind(block, matched, base, part) for part in parts}
        if astray:
            kinds = {p: "head permutation" if k == "none" else k for p, k in kinds.items()}
        found.append(kinds)
    return found


def _kind(
    block: AttentionBlock, state: Mapping[str, Tensor], base: Mapping[str, Tensor], part: Part
) -> Kind:
    """The kind of one block, heads matched already."""
    x, y = head_sides(block, state, part)
    x0, y0 = head_sides(block, base, part)
    size = (x0.square().sum((1, 2)) + y0.square().sum((1, 2))).clamp_min(1e-300)
    left = {
        kind: ((a @ x - x0).square().sum((1, 2)) / size
        + (torch.linalg.solve(a.mT, y) - y0).square().sum((1, 2)) / size).sqrt()
        for kind, a in _candidates(block, state, base, part).items()
    }  # fmt: skip
    *_, best = left
    enough = (NEARLY * left[best]).clamp_min(NEAR)
    found: Counter[Kind] = Counter()
    for head in range(len(x)):
        found[next((k for k in left if left[k][head] <= enough[head]), best)] += 1
    reached = 0
    for kind in reversed(KINDS):
        reached += found[kind]
        if reached >= SHARE * len(x):
            return kind
    return "none"


def _candidates(
    block: AttentionBlock, state: Mapping[str, Tensor], base: Mapping[str, Tensor], part: Part
) -> dict[Kind, Tensor]:
    """The nearest transform of each kind that keeps the function, the best one last."""
    x, y = head_sides(block, state, part)
    x0, y0 = head_sides(block, base, part)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    gauge = block.qk_gauge if part == "qk" else "general"
    if gauge == "sign":
        return {"none": eye, "signs": qk_gauge(block, state, base)}
    scaled: dict[Kind, Tensor] = {
        "none": eye,
        "per-head scaling": eye * _factors(x, x0, y, y0, whole=True),
        "diagonal": eye * _factors(x, x0, y, y0, whole=False),
    }
    cross = x0 @ x.mT + y0 @ y.mT
    best = (qk_gauge if part == "qk" else vo_gauge)(block, state, base)
    if gauge == "rotary":
        turning, rest = parted(block, cross)
        turned = joined(block, _turn(turning), _polar(rest))
        return scaled | {"orthogonal": turned, "rotary": best}
    return scaled | {"orthogonal": _polar(cross), "general": best}


def _polar(cross: Tensor) -> Tensor:
    """Procrustes: the orthogonal matrix per head nearest to ``cross``."""
    u, _, vt = torch.linalg.svd(cross)
    return u @ vt


def _factors(x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, *, whole: bool) -> Tensor:
    """The factor α per dimension, or per ``whole`` head, that minimises ‖αX − X0‖² + ‖Y/α − Y0‖²:
    (kv_heads, 1 or dh, 1). A complex number per pair whose other half is empty is a real one."""
    sides = [side.flatten(1)[:, None] if whole else side for side in (x, x0, y, y0)]
    padded = [torch.cat([side, torch.zeros_like(side)], 1) for side in sides]
    rows = sides[0].shape[1]
    return rotary_gauge(*padded).diagonal(dim1=1, dim2=2)[:, :rows, None]


def _turn(cross: Tensor) -> Tensor:
    """Procrustes among one rotation per pair (i, i + dh/2): the phase of ⟨x0, x⟩ + ⟨y0, y⟩."""
    half = cross.shape[1] // 2
    diagonal, lower, upper = (cross.diagonal(offset, 1, 2) for offset in (0, -half, half))
    z = torch.complex(diagonal[:, :half] + diagonal[:, half:], lower - upper)
    z = torch.where(z == 0, 1, z).sgn()
    return rotary_matrix(z.real, z.imag)
