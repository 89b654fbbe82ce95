"""Which gauges of a release were moved, and how far, read off its weights and those of the base.

    found = moved(group, released, base)
    found.amounts      # {"stream-permutation": 45.7, "norm-gain": 25.8}
    found.nearest      # the release with these kinds undone, and no others

Written r = h·s·e: an expert e, moved by the abelian gauges s (gains, shifts, scales) and by what is
found by comparison h (stream, heads, bases, units). All of h commutes with s up to the choice of s,
so that the h which :meth:`Group.match` finds in standard form can be taken off r as it is. What a
kind of h is worth is read off its own element; only the kinds of s have to be left out one by one,
on a State that they alone moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.anatomy.gauges.base import Abelian, Element, Gauge
from benchmark.anatomy.gauges.blocks import HeadOrder, UnitOrder
from benchmark.anatomy.gauges.group import ENOUGH, Group, Matched
from benchmark.anatomy.gauges.stream import StreamPermutation, StreamRotation, StreamSign
from benchmark.core.state import State, norm, task_vector

#: A kind was moved if without it the release stays so many times as far from the base. The noise of
#: a comparison comes to 1.16 on tiny models, the least of the elements that locks draw to 2.2.
MOVED = 1.25
#: A tensor is far nearer to the base by this factor, which is more than noise and less than a lock.
_FAR = 2.0
#: A rotation is a permutation with signs if every row has an entry of at least this size: 45°.
_ALONE = 0.5**0.5


@dataclass(frozen=True)
class Moved:
    """What was moved between a release and its base.

    Attributes:
        amounts: kind → how far from the base the release would stay were that kind alone left as it
            is, in units of what it is with all undone (of ‖τ‖); kinds that were not moved are left
            out.
        group: the gauges of these kinds; all, where some are needed that cannot be told apart.
        nearest: the point of their orbit that is nearest to the base.
        heads: the share of heads (KV groups) that traded places; ``units``: of hidden units and
            channels.
    """

    amounts: Mapping[str, float]
    group: Group
    nearest: State
    heads: float = 0.0
    units: float = 0.0


def moved(group: Group, released: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Moved:
    """The fewest kinds of ``group`` that bring ``released`` as near to ``base`` as all do."""
    group, whole = group.least(released, base)
    if not group.gauges:
        return Moved({}, group, whole)
    found = list(_simplest(group.match(released, base)))
    amounts = _matched(found, whole, base) | _abelian(group, found, released, base)
    amounts = {kind: amount for kind, amount in amounts.items() if amount > MOVED}
    few = group.subset(amounts)
    if not few.gauges:
        return Moved({}, few, dict(released))
    nearest = few.align(released, base)
    if _distance(nearest, base) > ENOUGH * _distance(whole, base):
        few, nearest = group, whole
    heads, units = (
        _share(found, kind) if kind.kind in amounts else 0.0 for kind in (HeadOrder, UnitOrder)
    )
    return Moved(amounts, few, nearest, heads, units)


def _simplest(found: Matched) -> Iterator[tuple[Gauge, Element]]:
    """A rotation that is a permutation with signs as these, which take nothing from τ; the rest as
    it is."""
    for gauge, element in found:
        if not isinstance(gauge, StreamRotation) or bool((element[0].abs().amax(1) < _ALONE).any()):
            yield gauge, element
            continue
        order = element[0].abs().argmax(1)
        sign = element[0].gather(1, order[:, None])[:, 0].sign()
        yield StreamPermutation(gauge.where, gauge.stream), (order,)
        yield StreamSign(gauge.where, gauge.stream), (sign,)


def _matched(found: Matched, whole: State, base: Mapping[str, Tensor]) -> dict[str, float]:
    """For the kinds found by comparison: how far their elements lead away again."""
    amounts = {}
    for kind in dict.fromkeys(gauge.kind for gauge, _ in found):
        away = dict(whole)
        for gauge, element in reversed(found):
            if gauge.kind == kind:
                gauge.move(away, gauge.inverse(element))
        amounts[kind] = _distance(away, base) / _distance(whole, base)
    return amounts


def _abelian(
    group: Group, found: Matched, released: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, float]:
    """For the abelian kinds: how far the release stays without each, everything else undone.

    What another kind can do as well is left to the inner one. A kind that brings one tensor nearer
    and as many farther away is no explanation: that tensor is odd, not the rest.
    """
    rest = dict(released)
    for gauge, element in found:
        gauge.move(rest, element)
    needed = group.subset({gauge.kind for gauge in group.gauges if isinstance(gauge, Abelian)})
    best = needed.align(rest, base)
    amounts: dict[str, float] = {}
    if _distance(rest, base) <= ENOUGH * _distance(best, base):
        return amounts
    for kind in needed.kinds:
        fewer = needed.without((kind,))
        without = fewer.align(rest, base)
        amount = _distance(without, base) / _distance(best, base)
        if amount > MOVED and _explains(best, without, base):
            amounts[kind] = amount
        else:
            needed, best = fewer, without
    return amounts


def _explains(best: State, without: State, base: Mapping[str, Tensor]) -> bool:
    """Whether more tensors are far nearer to the base in ``best`` than are far farther."""
    left, right = (
        {key: float(tau.double().norm()) for key, tau in task_vector(state, base).items()}
        for state in (best, without)
    )
    votes = 0
    for key in left.keys() | right.keys():
        here, there = left.get(key, 0.0), right.get(key, 0.0)
        votes += int(_FAR * here < there) - int(_FAR * there < here)
    return votes > 0


def _share(found: Matched, kind: type[Gauge]) -> float:
    """Of what the elements of this kind permute, the share that is not where it was."""
    orders = [order for gauge, element in found if isinstance(gauge, kind) for order in element]
    astray = sum(int((o != torch.arange(len(o), device=o.device)).sum()) for o in orders)
    return astray / sum(len(order) for order in orders)


def _distance(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    return norm(task_vector(state, base))
