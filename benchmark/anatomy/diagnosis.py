"""What was done to a release, read off its weights and those of the base.

    found = diagnose(released, base, anatomy)     # also: recovered, to judge an attack
    found.summary      # "looks like a per-head general lock with an MLP permutation; undone; …"

Which gauges of the whole group were moved (:mod:`benchmark.anatomy.gauges.moved`), what was done
inside the heads (:mod:`benchmark.anatomy.locks`), what an attack left standing, and how far from
the expert it ended. It says what the weights look like, not which defense it was: composites of two
locks look like the more general of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmark.anatomy import gauges
from benchmark.anatomy.locks import KINDS, Kind, Part, head_locks
from benchmark.anatomy.whole import Anatomy
from benchmark.core.state import State, norm, norm_growth, task_vector

#: Fine-tuning changes norms by a few per cent; a factor 2 is nobody's training.
INFLATED = 2.0
#: Relative moves of the matrices of one expert differ two- or threefold between layers.
OUTLIER = 5.0
#: Below this relative move nothing but rounding and ordinary training is at work.
NEAR = 0.05
#: Beyond this share of ‖θ0‖ the aligned release is another model, not a locked fine-tune.
FOREIGN = 0.5
#: Alignment moves an expert so many times as far as it moves noise of its length: 0.5 to 0.8 on
#: MiniLM and digits, whose training went mostly across the orbits of what keeps the function, where
#: gradients have no part; up to 1.2 for a random τ in tiny models.
TRAINED = 0.75
#: Of the noise; none that a model or lock is likely to be drawn with.
_SEED = 0x5EED_0F_7A0

#: The kinds of gauge that permute or flip and so take nothing from τ.
_DISCRETE = ("stream-permutation", "stream-sign", "qk-sign", "heads", "query-heads", "units")
#: Those inside blocks, which words for the lock describe, and the bias that softmax ignores.
_INSIDE, _KEY_BIAS = ("heads", "query-key", "value-output", "units"), "key-bias"
_BASES: dict[Part, str] = {"qk": "query-key", "vo": "value-output"}
#: At most so many gauges are told in one line; ``to_dict`` has all.
_TOLD = 6

_NOUNS = {
    "stream-rotation": "a residual rotation",
    "stream-permutation": "a residual permutation",
    "stream-sign": "residual signs",
    "batch-norm": "batch-norm statistics",
    "bridge": "a basis between encoder and decoder",
    "instance-norm": "scales of filters",
    "layer-scale": "layer scales",
    "norm-shift": "norm shifts",
    "norm-gain": "norm gains",
    "qk-gain": "QK-norm gains",
    "qk-sign": "signs of QK-norm gains",
    "query-heads": "the order of query heads",
    "null-direction": "null directions of norms",
    "value-shift": "value biases",
    "embedding-shift": "shifted embeddings",
    "constant": "constants on the residual axis",
    "unit-scale": "unit scales",
    "qk-length": "Q/K lengths",
    "stream-scale": "residual scales",
    "norm-scale": "norm scales",
    "heads": "a head permutation",
    "query-key": "Q/K bases",
    "key-bias": "key biases",
    "value-output": "V/O bases",
    "units": "a permutation of hidden units",
}


@dataclass(frozen=True)
class Diagnosis:
    """What was found. Shares are in [0, 1]; lengths leave out key biases that softmax ignores.

    Attributes:
        qk: the lock on Q and K; ``vo``: that on V and O. One of ``KINDS``, the most general of all
            blocks; ``blocks_locked`` counts the attention blocks that have any, of ``blocks``.
        heads_moved: heads (KV groups) that traded places; ``units_moved``: hidden MLP units and
            channels; ``coupled``: whether there are channels.
        gauges: the kinds of gauge that were moved → how far from the base, in units of ‖τ‖, the
            release would stay were that kind alone left as it is.
        remaining: the same of those that the attack left standing.
        growth: the largest ‖W‖/‖W0‖ of a matrix in the release; ``growth_left``: after the attack.
        outliers: matrices that, after the attack, moved from the base far more than the rest.
        residual: about how far ``recovered`` is from the expert, in units of ‖τ‖.
        distance: ‖recovered − base‖ / ‖base‖.
        foreign: even aligned, with norms as usual, the release is another model than the base.
        missing: what was not looked at, and why: weights and gauges that no row covers.
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
    foreign: bool
    coupled: bool = False
    gauges: Mapping[str, float] = field(default_factory=dict)
    remaining: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def undone(self) -> bool:
        """Whether the attack left none of the gauges moved."""
        return not self.remaining

    @property
    def locked(self) -> bool:
        """Whether any gauge was moved."""
        return bool(self.gauges)

    @property
    def summary(self) -> str:
        """One line for people."""
        unseen = f"; not looked at: {'; '.join(self.missing)}" if self.missing else ""
        return self._seen() + unseen

    def _seen(self) -> str:
        if self.foreign:
            return (
                f"no lock explains the distance: {self.distance:.2f} of ‖θ0‖ is left "
                "(another model, or a defense of another kind)"
            )
        parts = [f"looks like {self._what()}", self._left()] if self.gauges else ["no lock found"]
        if self.undone and self.growth_left > INFLATED:  # else the lock explains what else is odd
            parts.append(f"norms still inflated {self.growth_left:.1f}×")
        if self.undone and self.outliers:
            more = f" and {len(self.outliers) - 1} more" if len(self.outliers) > 1 else ""
            parts.append(f"{self.outliers[0]}{more} moved far more than the rest")
        if self.gauges or self.residual:
            parts.append(_far(self.residual))
        return "; ".join(parts if len(parts) > 1 else [*parts, "left as it is"])

    def to_dict(self) -> dict[str, object]:
        """All fields and the summary, as JSON values."""
        fields = asdict(self) | {
            "outliers": list(self.outliers),
            "missing": list(self.missing),
            "undone": self.undone,
        }
        return {"summary": self.summary, **fields}

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
        if self.units_moved:
            found.append("a permutation of channels" if self.coupled else "an MLP permutation")
        if "per-head scaling" in (self.qk, self.vo) and self.growth > INFLATED:
            found.append(f"norms inflated up to {self.growth:.1f}×")
        named = {"heads", "units"}
        named |= {_BASES["qk"]} if self.qk != "none" else set()
        named |= {_BASES["vo"]} if self.vo != "none" else set()
        nouns = _nouns({k: v for k, v in self.gauges.items() if k not in named})
        return _listed([*found, *nouns]) + (" moved" if nouns and _plain(nouns[-1]) else "")

    def _left(self) -> str:
        if self.undone:
            return "undone"
        done = "undone in part" if self.gauges.keys() - self.remaining.keys() else "not undone"
        return f"{done}: {_listed(_nouns(self.remaining))} left"


def diagnose(
    released: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    anatomy: Anatomy,
    recovered: Mapping[str, Tensor] | None = None,
) -> Diagnosis:
    """Compare ``released`` with ``base``, gauge by gauge.

    ``recovered``: what an attack made of it; by default the release with all that was moved undone
    (:func:`benchmark.anatomy.gauges.moved`).
    """
    found = gauges.moved(gauges.of(anatomy, released), released, base)
    recovered = found.nearest if recovered is None else recovered
    start, nearest, reached, given = (
        _without_key_biases(state, anatomy) for state in (base, found.nearest, recovered, released)
    )
    left, unexplained = task_vector(reached, start), task_vector(nearest, start)
    whole = norm({k: v for k, v in start.items() if v.is_floating_point()})
    erased = _erased(found, nearest, start)
    length = (norm(unexplained) ** 2 + erased**2) ** 0.5
    away = (norm(task_vector(reached, nearest)) ** 2 + erased**2) ** 0.5
    foreign = norm(unexplained) > FOREIGN * whole and norm_growth(found.nearest, base) <= INFLATED
    qk, vo, locked = _locks(found, released, base, anatomy)
    return Diagnosis(
        qk=qk,
        vo=vo,
        blocks_locked=locked,
        blocks=len(anatomy.attention),
        heads_moved=found.heads,
        units_moved=found.units,
        growth=norm_growth(released, base),
        growth_left=norm_growth(recovered, base),
        outliers=_outliers(left, base),
        residual=away / length if length else 0.0,
        distance=norm(left) / whole,
        coupled=bool(anatomy.channels),
        foreign=foreign,
        gauges=dict(found.amounts),
        remaining={} if foreign else _remaining(found, given, reached, nearest, start),
        missing=tuple(filter(None, (anatomy.left_out, *found.group.missing))),
    )


def _erased(found: gauges.Moved, nearest: State, base: State) -> float:
    """About how far undoing the gauges moved the expert: ‖expert − nearest‖.

    Not to be seen from ``nearest``, where τ has no part along the gauges any more. So a stand-in
    for the expert, the base and noise of the length that every tensor of ``nearest`` has moved, is
    aligned in its place; what that moves it by times ``TRAINED``.
    """
    group = found.group.without(_DISCRETE)
    if not group.gauges:
        return 0.0
    rng, expert = torch.Generator().manual_seed(_SEED), dict(base)
    for key, tau in task_vector(nearest, base).items():
        noise = torch.randn(tau.shape, generator=rng).to(tau.device)
        size = tau.double().norm() / noise.double().norm().clamp_min(1e-300)
        expert[key] = base[key].float() + size.float() * noise
    return TRAINED * norm(task_vector(group.align(expert, base), expert))


def _remaining(
    found: gauges.Moved, released: State, reached: State, nearest: State, base: State
) -> dict[str, float]:
    """Which of the gauges that were moved still are, and how far; a key bias is nothing to undo."""
    near = gauges.ENOUGH * norm(task_vector(nearest, base))
    if norm(task_vector(reached, base)) <= near:
        return {}
    if not task_vector(reached, released):
        return {kind: v for kind, v in found.amounts.items() if kind != _KEY_BIAS}
    return dict(gauges.moved(found.group.without((_KEY_BIAS,)), reached, base).amounts)


def _locks(
    found: gauges.Moved,
    released: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    anatomy: Anatomy,
) -> tuple[Kind, Kind, int]:
    """The kind of lock on Q and K, on V and O, and the number of blocks that have any.

    Seen after everything outside the heads is undone, which would look like a general lock.
    """
    if not found.amounts.keys() & {"heads", *_BASES.values()}:
        return "none", "none", 0
    outer = found.group.subset(found.amounts).without(_INSIDE)
    blocks = head_locks(*outer.meet(released, base), anatomy)
    for kinds in blocks:
        for part, gauge in _BASES.items():
            if gauge not in found.amounts and kinds[part] != "head permutation":
                kinds[part] = "none"
    qk, vo = (max((kinds[part] for kinds in blocks), key=KINDS.index) for part in _BASES)
    return qk, vo, sum(set(kinds.values()) != {"none"} for kinds in blocks)


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
    found = [key for key, move in moves.items() if move > max(OUTLIER * median, NEAR)]
    return tuple(sorted(found, key=lambda key: -moves[key]))


def _without_key_biases(state: Mapping[str, Tensor], anatomy: Anatomy) -> State:
    out = dict(state)
    for block in anatomy.attention:
        if block.k.bias is not None and block.joint is None:
            bias = block.k.bias.read(out)
            free = block.free_rows.to(bias.device).repeat(block.kv_heads)
            block.k.bias.write(out, bias.masked_fill(free, 0))
    return out


def _named(kind: Kind) -> str:
    special = {
        "head permutation": "a head permutation",
        "signs": "signs of head dimensions",
        "per-head scaling": "a per-head scaling",
        "rotary": "a rotation and scale per frequency pair",
    }
    return special.get(kind, f"a per-head {kind} lock")


def _nouns(amounts: Mapping[str, float]) -> list[str]:
    """The gauges, the farthest first, after those that an article tells apart from what moved."""
    farthest = [_NOUNS[kind] for kind in sorted(amounts, key=lambda kind: -amounts[kind])]
    return sorted(farthest, key=_plain)


def _plain(noun: str) -> bool:
    return not noun.startswith("a ")


def _listed(parts: Sequence[str]) -> str:
    """``a with b, c and d``, not more than fit in a line."""
    told = list(parts[:_TOLD])
    if len(parts) > _TOLD:
        told.append(f"{len(parts) - _TOLD} more")
    head, *rest = told
    if len(rest) > 1:
        rest = [f"{', '.join(rest[:-1])} and {rest[-1]}"]
    return " with ".join([head, *rest])


def _far(residual: float) -> str:
    if residual == 0:
        return "the expert itself"
    if residual < 0.01:
        return "less than 0.01 ‖τ‖ from the expert"
    return f"about {residual:.{'0f' if residual >= 10 else '2g'}} ‖τ‖ from the expert"
