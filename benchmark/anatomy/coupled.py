"""Matching of units that share tensors: channels of convolutional networks, all groups together.

The output axis of one convolution is the input axis of the next, so no group can be matched alone.
As in Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1) one group is matched after
the other, the rest held fixed, until nothing moves. Each step maximises

    Σ_t ⟨θ0_t, (π·θ)_t⟩ / rms(θ0_t)²        over the tensors t that the group touches,

so the sum over all tensors only grows. The weights make a tensor count by how far it moved relative
to its own scale: running variances are hundreds where weights are hundredths.

The published algorithm starts from the identity, where a thoroughly permuted network tells nothing
and the steps end in a poor optimum. Here a second start needs no order of the other groups: every
unit is matched by its entries *sorted* along the axes that other groups permute. That is already
the answer as long as the task vector is small against the weights; the better end counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmark.anatomy.blocks import Channels, MLPBlock
from benchmark.anatomy.gauge import permute_units
from benchmark.anatomy.nest import nearest

Units = MLPBlock | Channels

#: Sweeps over all groups; from a good start the second one finds nothing to move.
_SWEEPS = 30


def match_coupled(
    groups: Sequence[Units],
    state: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    cost: Literal["inner", "cosine"] = "inner",
) -> list[Tensor]:
    """The permutation (n,) int64 for ``permute_units`` of each group, matched together.

    ``cost=cosine`` compares the directions of the rows that make each unit instead, in both starts
    and in every step. On the CPU.
    """
    keys = {axis.slot.key for group in groups for axis in group.axes}
    start, goal = ({key: source[key].float() for key in keys} for source in (state, anchor))
    if cost == "inner":
        for key, value in goal.items():
            scale = value.square().mean().sqrt().clamp_min(torch.finfo(value.dtype).tiny)
            start[key], goal[key] = start[key] / scale, value / scale
    identity = [torch.arange(group.width(goal)) for group in groups]
    sorts = _Signatures(groups, cost)
    known = [_telling(group) for group in groups]
    ends = [
        _descend(groups, known, start, goal, cost, first)
        for first in (
            identity,
            [nearest(sorts.of(g, start), sorts.of(g, goal), g.nest) for g in known],
        )
    ]
    return min(ends, key=lambda end: end[1])[0]


def _telling(group: Units) -> Units:
    """The group by what tells its units apart."""
    if not isinstance(group, Channels):
        return group
    return replace(group, axes=tuple(axis for axis in group.axes if not axis.mixed))


def _descend(
    groups: Sequence[Units],
    known: Sequence[Units],
    start: Mapping[str, Tensor],
    goal: Mapping[str, Tensor],
    cost: str,
    first: Sequence[Tensor],
) -> tuple[list[Tensor], float]:
    """Match group by group, by what is ``known`` of each, until nothing moves: the permutations,
    and how far the end is."""
    work, orders = dict(start), list(first)
    for group, order in zip(groups, orders, strict=True):
        permute_units(work, group, order)
    told = {axis.slot.key for group in known for axis in group.axes}
    for _ in range(_SWEEPS):
        moved = False
        for i, group in enumerate(groups):
            own, reference = (_features(known[i], s, cost) for s in (work, goal))
            order = nearest(own, reference, group.nest)
            gain = (reference * (own[order.to(own.device)] - own)).sum()
            # Without a real gain the step is a tie, and ties can be exchanged for ever.
            if gain > 1e-6 * (own.norm() * reference.norm()):
                permute_units(work, group, order)
                orders[i], moved = orders[i][order], True
        if not moved:
            break
    return orders, sum(float((work[key] - goal[key]).square().sum()) for key in told)


def _features(group: Units, state: Mapping[str, Tensor], cost: str) -> Tensor:
    """What a step compares: (n, features) float32."""
    if cost == "cosine":
        return normalize(group.read_rows(state).flatten(1), dim=1)
    return torch.cat([_flat(axis.read(state)) for axis in group.axes], 1)


class _Signatures:
    """What of a unit does not depend on the order of the units of other groups."""

    def __init__(self, groups: Sequence[Units], cost: str) -> None:
        self.cost = cost
        self.renamed = {(axis.slot.key, axis.dim) for group in groups for axis in group.axes}

    def of(self, group: Units, state: Mapping[str, Tensor]) -> Tensor:
        """(n, features) float32."""
        parts = []
        for axis in group.axes:
            value = axis.slot.read(state)
            if self.cost == "cosine" and (axis.dim != 0 or value.ndim < 2):
                continue
            for other in range(value.ndim):
                if other != axis.dim and (axis.slot.key, other) in self.renamed:
                    value = value.sort(dim=other).values
            parts.append(_flat(value.movedim(axis.dim, 0)))
        found = torch.cat(parts, 1)
        return normalize(found, dim=1) if self.cost == "cosine" else found


def _flat(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)
