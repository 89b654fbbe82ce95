"""Which permutations of channels keep the groups of the norms that read them.

A GroupNorm takes mean and variance over a group, so channels trade places inside their group, and
whole groups trade places. Where several norms read the same channels (UNets, whose skips stand
beside other channels), what is free are the trees' own symmetries: nodes that are alike and hang on
the same node, whole, and below each the same again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmark.anatomy.assignment import assign

#: No length is divided by less.
TINY = 1e-30
#: Start and stop, and what of a norm this is: two parts are alike only where these are.
Part = tuple[int, int, str]


@dataclass(frozen=True)
class Nest:
    """Channels ``start:stop``, which trade places below ``inner``, or all where there is none."""

    start: int
    stop: int
    marks: tuple[str, ...] = ()
    inner: tuple[Nest, ...] = ()

    @property
    def shape(self) -> tuple[object, ...]:
        """What two nodes must share to trade places."""
        return (self.stop - self.start, self.marks, tuple(node.shape for node in self.inner))

    @staticmethod
    def of(width: int, parts: Iterable[Part]) -> Nest | None:
        """The tree of all ``parts`` of (0, width); None where all channels are free.

        Parts that cross one another are cut at each other's ends, and then stay in their places.
        """
        found: dict[tuple[int, int], list[str]] = {}
        for start, stop, mark in parts:
            found.setdefault((start, stop), []).append(mark)
        spans = sorted(found, key=lambda span: (span[0], -span[1]))
        if any(a < c < b < d for a, b in spans for c, d in spans):
            ends = sorted({0, width, *(end for span in spans for end in span)})
            return Nest(0, width, (), tuple(Nest(*cut, (str(cut),)) for cut in pairwise(ends)))
        found.pop((0, width), None)  # a norm over all of them
        if not found:
            return None
        return Nest(0, width, (), _below((0, width), sorted(found), found))

    def shuffled(self, rng: torch.Generator) -> Tensor:
        """A random permutation that keeps the tree: (width,) int64."""
        order = torch.empty(self.stop, dtype=torch.int64)
        for target, source in self._drawn(self, rng):
            places = torch.arange(source.start, source.stop)
            order[target.start : target.stop] = places[torch.randperm(len(places), generator=rng)]
        return order

    def assign(self, similarity: Tensor) -> Tensor:
        """π of the tree with Σ_i similarity[i, π(i)] greatest, on the CPU."""
        return _best(self, self, similarity.cpu())[1]

    def _drawn(self, source: Nest, rng: torch.Generator) -> Iterator[tuple[Nest, Nest]]:
        """Leaves of this node, and the leaves of ``source`` that come into their places."""
        if not self.inner:
            yield self, source
        for targets, sources in _alike(self, source):
            for i, j in enumerate(torch.randperm(len(sources), generator=rng).tolist()):
                yield from targets[i]._drawn(sources[j], rng)


def nearest(own: Tensor, reference: Tensor, nest: Nest | None = None) -> Tensor:
    """π with Σ_i ⟨reference[i], own[π(i)]⟩ greatest, for rows (n, features) of float32."""
    # A row longer than any there (a unit that never fires may hold anything) is cut to that length:
    # its rounding errors would else outweigh what tells the others apart.
    # In float64, where no square of a float32 is too large.
    lengths, known = (
        torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        for rows in (own, reference)
    )
    own = own * (known.max() / lengths.clamp_min(TINY)).clamp(max=1).to(own.dtype)
    similarity = reference @ own.T
    # A constant per column changes no assignment's rank, and turns the greatest entry of a row from
    # the longest neighbour into the nearest one, which is mostly the answer already (assign).
    return best(similarity - own.square().sum(1) / 2, nest)


def best(similarity: Tensor, nest: Nest | None = None) -> Tensor:
    """The permutation of ``nest``, or of all, with Σ_i similarity[i, π(i)] greatest: (n,)."""
    return assign(similarity) if nest is None else nest.assign(similarity)


def shuffled(width: int, nest: Nest | None, rng: torch.Generator) -> Tensor:
    """A random permutation of ``nest``, or of all: (width,) int64."""
    return torch.randperm(width, generator=rng) if nest is None else nest.shuffled(rng)


def _below(
    span: tuple[int, int], inside: list[tuple[int, int]], marks: dict[tuple[int, int], list[str]]
) -> tuple[Nest, ...]:
    """The nodes below ``span``, what no part holds as one that stays."""
    found, at = [], span[0]
    for start, stop in sorted(inside, key=lambda part: (part[0], -part[1])):
        if start < at:
            continue  # inside the one before
        if start > at:
            found.append(Nest(at, start, (f"from {at}",)))
        own = [p for p in inside if start <= p[0] and p[1] <= stop and p != (start, stop)]
        below = _below((start, stop), own, marks) if own else ()
        found.append(Nest(start, stop, tuple(sorted(marks[start, stop])), below))
        at = stop
    if at < span[1]:
        found.append(Nest(at, span[1], (f"from {at}",)))
    return tuple(found)


def _alike(target: Nest, source: Nest) -> Iterator[tuple[list[Nest], list[Nest]]]:
    """The nodes below both, by their shapes."""
    for shape in dict.fromkeys(node.shape for node in target.inner):
        yield (
            [node for node in target.inner if node.shape == shape],
            [node for node in source.inner if node.shape == shape],
        )


def _best(target: Nest, source: Nest, similarity: Tensor) -> tuple[float, Tensor]:
    """The best sum with ``source`` in the place of ``target``, and the permutation there."""
    if not target.inner:
        block = similarity[target.start : target.stop, source.start : source.stop]
        order = assign(block)
        return float(block[torch.arange(len(order)), order].sum()), order + source.start
    order, total = torch.empty(target.stop - target.start, dtype=torch.int64), 0.0
    for targets, sources in _alike(target, source):
        found = [[_best(t, s, similarity) for s in sources] for t in targets]
        scores = torch.tensor([[score for score, _ in row] for row in found], dtype=torch.float64)
        for i, j in enumerate(assign(scores).tolist()):
            total += found[i][j][0]
            at = targets[i].start - target.start
            order[at : at + len(found[i][j][1])] = found[i][j][1]
    return total, order
