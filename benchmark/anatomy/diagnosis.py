"""What was done to a release, read off its weights and those of the base.

    found = diagnose(released, base, anatomy)     # also: recovered, to judge an attack
    found.summary      # "looks like a per-head general lock with an MLP permutation; undone; …"

Per head the simplest transform is named that explains the release nearly as well as the best one of
the gauge group does (METHODS section 1). It says what the weights look like, not which defense it
was: composites of two locks look like the more general of the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmark.anatomy.alignment import (
    head_sides,
    match_all,
    match_heads,
    qk_gauge,
    rotary_gauge,
    vo_gauge,
)
from benchmark.anatomy.blocks import AttentionBlock
from benchmark.anatomy.gauge import permute_heads
from benchmark.anatomy.gauges import align
from benchmark.anatomy.whole import Anatomy
from benchmark.core.state import State, norm, norm_growth, task_vector

Kind = Literal["none", "head permutation", "per-head scaling", "diagonal", "orthogonal", "general"]
#: From the simplest to the most general.
KINDS: tuple[Kind, ...] = (
    "none", "head permutation", "per-head scaling", "diagonal", "orthogonal", "general",
)  # fmt: skip

#: A transform explains a head if it leaves at most so many times what the best one leaves. A random
#: τ loses dh/(2d) of its energy to the best, so the ratio is at most √2 for one that is no lock.
NEARLY = 1.5
#: A head that is this near to the base (relative) is explained whatever fits it better: fine-tuning
#: moves weights by about 1 to 5 %, every lock we know by more than 50 %.
NEAR = 0.05
#: A block has the most general kind that this share of its heads reaches: one odd head (pruned,
#: nearly empty) names no lock.
SHARE = 0.25
#: Hidden units that nothing tells apart (dead ones) are matched anyhow; a permutation moves most.
UNITS = 0.1
#: Fine-tuning changes norms by a few per cent; a factor 2 is nobody's training.
INFLATED = 2.0
#: Relative moves of the matrices of one expert differ two- or threefold between layers.
OUTLIER = 5.0
#: Beyond this share of ‖θ0‖ the aligned release is another model, not a locked fine-tune.
FOREIGN = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """What was found. Shares are in [0, 1]; lengths leave out key biases that softmax ignores.

    Attributes:
        qk: the lock on Q and K; ``vo``: that on V and O. One of ``KINDS``, the most general of all
            blocks; ``blocks_locked`` counts the attention blocks that have any, of ``blocks``.
        heads_moved: heads (KV groups) that traded places; ``units_moved``: hidden MLP units and
            channels; ``coupled``: whether there are channels.
        growth: the largest ‖W‖/‖W0‖ of a matrix in the release; ``growth_left``: after the attack.
        outliers: matrices that, after the attack, moved from the base far more than the rest.
        residual: ‖recovered − base‖ / ‖released − base‖ (0 where nothing moved).
        distance: ‖recovered − base‖ / ‖base‖.
        undone: nothing of the lock or the permutations is found in what the attack recovered.
        foreign: even aligned, with norms as usual, the release is another model than the base.
    """

    qk: Kind
    vo: Kind
    blocks_locked: int
    blocks: int
    heads_moved: float
    units_moved: float
    growth: float
    growth_left: float
    outliers: tuple[str, ...]
    residual: float
    distance: float
    undone: bool
    foreign: bool
    coupled: bool = False

    @property
    def summary(self) -> str:
        """One line for people."""
        what = self._what()
        if self.foreign:
            return (
                f"no lock explains the distance: {self.distance:.2f} of ‖θ0‖ is left "
                "(another model, or a defense of another kind)"
            )
        parts = [f"looks like {what}"] if what else ["no lock found"]
        if what:
            parts.append("undone" if self.undone else "not undone")
        plain = self.undone or not what  # else the lock explains what else is odd
        if plain and self.growth_left > INFLATED:
            parts.append(f"norms still inflated {self.growth_left:.1f}×")
        if plain and self.outliers:
            more = f" and {len(self.outliers) - 1} more" if len(self.outliers) > 1 else ""
            parts.append(f"{self.outliers[0]}{more} moved far more than the rest")
        parts.append(f"{self.residual:.2g} of ‖τ‖ is left")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """All fields and the summary, as JSON values."""
        return {"summary": self.summary, **asdict(self), "outliers": list(self.outliers)}

    @property
    def locked(self) -> bool:
        """Whether any gauge transform or permutation was found."""
        return bool(self._what())

    def _what(self) -> str:
        found = []
        if self.qk == self.vo != "none":
            found.append(_named(self.qk))
        else:
            found += [
                f"{_named(kind)} on {where}"
                for kind, where in ((self.qk, "Q/K"), (self.vo, "V/O"))
                if kind != "none"
            ]
        if found and self.blocks_locked < self.blocks:
            found[-1] += f" in {self.blocks_locked} of {self.blocks} attention blocks"
        if self.heads_moved and "head permutation" not in (self.qk, self.vo):
            found.append("a head permutation")
        if self.units_moved > UNITS:
            found.append("a permutation of channels" if self.coupled else "an MLP permutation")
        if "per-head scaling" in (self.qk, self.vo) and self.growth > INFLATED:
            found.append(f"norms inflated up to {self.growth:.1f}×")
        return " with ".join(found[:2]) + "".join(f" and {more}" for more in found[2:])


def diagnose(
    released: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    anatomy: Anatomy,
    recovered: Mapping[str, Tensor] | None = None,
) -> Diagnosis:
    """Compare ``released`` with ``base``, block by block.

    ``recovered``: what an attack made of it; by default the aligned release
    (:func:`benchmark.anatomy.gauges.align`).
    """
    aligned = align(released, base, anatomy)
    recovered = aligned if recovered is None else recovered
    before, after = _Locks(released, base, anatomy), _Locks(recovered, base, anatomy)
    start = _without_key_biases(base, anatomy)
    moved, left, unexplained = (
        task_vector(_without_key_biases(state, anatomy), start)
        for state in (released, recovered, aligned)
    )
    length, whole = norm(moved), norm({k: v for k, v in start.items() if v.is_floating_point()})
    return Diagnosis(
        qk=before.qk,
        vo=before.vo,
        blocks_locked=before.blocks_locked,
        blocks=len(anatomy.attention),
        heads_moved=before.heads_moved,
        units_moved=before.units_moved,
        growth=norm_growth(released, base),
        growth_left=norm_growth(recovered, base),
        outliers=_outliers(left, base),
        residual=norm(left) / length if length else 0.0,
        distance=norm(left) / whole,
        undone=not after.any,
        coupled=bool(anatomy.channels),
        foreign=norm(unexplained) > FOREIGN * whole and norm_growth(aligned, base) <= INFLATED,
    )


class _Locks:
    """What stands between a State and the base."""

    def __init__(
        self, state: Mapping[str, Tensor], base: Mapping[str, Tensor], anatomy: Anatomy
    ) -> None:
        kinds: list[tuple[Kind, Kind]] = []
        heads = moved_heads = units = moved_units = 0
        for block in anatomy.attention:
            order = match_heads(block, state, base)
            moved = int((order != torch.arange(len(order))).sum())
            heads, moved_heads = heads + len(order), moved_heads + moved
            matched = dict(state)
            permute_heads(matched, block, order)
            qk = _kind(block, matched, base, "qk")
            vo = _kind(block, matched, base, "vo")
            if moved:
                qk, vo = (k if k != "none" else "head permutation" for k in (qk, vo))
            kinds.append((qk, vo))
        for order in match_all(anatomy, state, base):
            units += len(order)
            moved_units += int((order != torch.arange(len(order))).sum())
        self.qk: Kind = max((qk for qk, _ in kinds), key=KINDS.index, default="none")
        self.vo: Kind = max((vo for _, vo in kinds), key=KINDS.index, default="none")
        self.blocks_locked = sum(pair != ("none", "none") for pair in kinds)
        self.heads_moved = moved_heads / heads if heads else 0.0
        self.units_moved = moved_units / units if units else 0.0

    @property
    def any(self) -> bool:
        return bool(self.blocks_locked) or self.units_moved > UNITS


def _kind(
    block: AttentionBlock,
    state: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    part: Literal["qk", "vo"],
) -> Kind:
    """The kind of one block, heads matched already."""
    x, y = head_sides(block, state, part)
    x0, y0 = head_sides(block, base, part)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    u, _, vt = torch.linalg.svd(x0 @ x.mT + y0 @ y.mT)
    candidates: dict[Kind, Tensor] = {
        "none": eye,
        "per-head scaling": eye * _factors(x, x0, y, y0, whole=True),
        "diagonal": eye * _factors(x, x0, y, y0, whole=False),
        "orthogonal": u @ vt,
        "general": (qk_gauge if part == "qk" else vo_gauge)(block, state, base),
    }
    size = (x0.square().sum((1, 2)) + y0.square().sum((1, 2))).clamp_min(1e-300)
    left = {
        kind: ((a @ x - x0).square().sum((1, 2)) / size
        + (torch.linalg.solve(a.mT, y) - y0).square().sum((1, 2)) / size).sqrt()
        for kind, a in candidates.items()
    }  # fmt: skip
    enough = (NEARLY * left["general"]).clamp_min(NEAR)
    found: Counter[Kind] = Counter()
    for head in range(len(x)):
        found[next((k for k in left if left[k][head] <= enough[head]), "general")] += 1
    reached = 0
    for kind in reversed(KINDS):
        reached += found[kind]
        if reached >= SHARE * len(x):
            return kind
    return "none"


def _factors(x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, *, whole: bool) -> Tensor:
    """The factor α per dimension, or per ``whole`` head, that minimises ‖αX − X0‖² + ‖Y/α − Y0‖²:
    (kv_heads, 1 or dh, 1). A complex number per pair whose other half is empty is a real one."""
    sides = [side.flatten(1)[:, None] if whole else side for side in (x, x0, y, y0)]
    padded = [torch.cat([side, torch.zeros_like(side)], 1) for side in sides]
    rows = sides[0].shape[1]
    return rotary_gauge(*padded).diagonal(dim1=1, dim2=2)[:, :rows, None]


def _outliers(left: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Matrices whose relative move is over ``OUTLIER`` times the median, the farthest first."""
    moves = {
        key: float(tau.double().norm() / base[key].double().norm().clamp_min(1e-300))
        for key, tau in left.items()
        if tau.ndim > 1
    }
    if not moves:
        return ()
    median = sorted(moves.values())[len(moves) // 2]
    # Below NEAR nothing but rounding and ordinary training is at work.
    found = [key for key, move in moves.items() if move > max(OUTLIER * median, NEAR)]
    return tuple(sorted(found, key=lambda key: -moves[key]))


def _without_key_biases(state: Mapping[str, Tensor], anatomy: Anatomy) -> State:
    out = dict(state)
    for block in anatomy.attention:
        if block.k.bias is not None and block.free_key_bias:
            block.k.bias.write(out, torch.zeros_like(block.k.bias.read(out)))
    return out


def _named(kind: Kind) -> str:
    if kind == "head permutation":
        return "a head permutation"
    if kind == "per-head scaling":
        return "a per-head scaling"
    return f"a per-head {kind} lock"
