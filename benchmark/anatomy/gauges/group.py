"""The whole gauge group of a model: one list of gauges, outer ones first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmark.anatomy.blocks import Axis, Channels, MLPBlock, Slot
from benchmark.anatomy.gauges.base import Abelian, Element, Gauge, beside
from benchmark.anatomy.gauges.batchnorm import Statistics
from benchmark.anatomy.gauges.blocks import HeadOrder, QueryKey, QueryOrder, UnitOrder, ValueOutput
from benchmark.anatomy.gauges.bridge import BridgeBasis
from benchmark.anatomy.gauges.instance import FilterScale
from benchmark.anatomy.gauges.norms import NormShift, NullDirection
from benchmark.anatomy.gauges.rows.towers import wiring
from benchmark.anatomy.gauges.scales import (
    LayerScale,
    NormGain,
    NormScale,
    QueryKeyGain,
    QueryKeyLength,
    QueryKeySign,
    SegmentScale,
    UnitScale,
)
from benchmark.anatomy.gauges.shifts import Constant, EmbeddingShift, KeyBias, ValueShift
from benchmark.anatomy.gauges.stream import StreamPermutation, StreamRotation, StreamSign
from benchmark.anatomy.gauges.wiring import Segment, Stream, columns, matrix
from benchmark.anatomy.whole import Anatomy
from benchmark.core.errors import UsageError
from benchmark.core.state import State, task_vector

#: The kinds, outer ones first: each is in standard form before the next is looked at.
KINDS: tuple[type[Gauge], ...] = (
    StreamRotation,
    StreamPermutation,
    StreamSign,
    Statistics,
    FilterScale,
    LayerScale,
    NormShift,
    NormGain,
    QueryKeySign,
    QueryKeyGain,
    NullDirection,
    ValueShift,
    Constant,  # before the middle of the embeddings, which it would blur
    EmbeddingShift,
    NormScale,  # of which the rows of units and of queries may be what reads it
    UnitScale,
    QueryKeyLength,
    SegmentScale,
    BridgeBasis,  # before the heads whose keys and values read it
    HeadOrder,
    QueryOrder,
    QueryKey,
    KeyBias,  # which a change of the keys' basis turns too
    ValueOutput,
    UnitOrder,
)

#: Those inside attention blocks and MLPs and between channels: what published locks draw from.
BLOCKS = tuple(
    k.kind for k in (KeyBias, UnitScale, HeadOrder, QueryOrder, QueryKey, ValueOutput, UnitOrder)
)
#: Those that take nothing from a task vector when they are undone.
PERMUTATIONS = tuple(
    k.kind for k in (StreamPermutation, StreamSign, HeadOrder, QueryOrder, UnitOrder)
)

#: Gauges with their elements, in the order in which they are applied.
Matched = Sequence[tuple[Gauge, Element]]

#: Rounds of least distance after the closed form.
_SWEEPS = 1
#: A smaller group will do if it comes this near to the base, in units of what the whole one leaves:
#: an expert is at 1.00 to 1.01 as it is, every lock we know beyond 10.
ENOUGH = 1.05


@dataclass(frozen=True)
class Group:
    """Gauges of one model. ``missing``: which it might have that no row answers for, and why."""

    gauges: tuple[Gauge, ...]
    missing: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds it has, outer ones first."""
        return tuple(dict.fromkeys(gauge.kind for gauge in self.gauges))

    @property
    def exact(self) -> Group:
        """Without what is exact only as far as the ε of a norm is nothing beside the variance.

        That hangs on data: CLIP's and Llama's ε of 1e-5 is a percent of the variance of embeddings
        whose entries are of size 0.02.
        """
        return replace(self, gauges=tuple(g for g in self.gauges if not g.up_to_eps))

    @property
    def smooth(self) -> Group:
        """Those of which an element can be learned (:meth:`Gauge.at`)."""
        return replace(self, gauges=tuple(g for g in self.gauges if g.smooth))

    def subset(self, names: Collection[str]) -> Group:
        """The gauges of these kinds (``norm-gain``) or names (``norm-gain@encoder.layer.0.norm1``).

        Raises:
            UsageError: no model has such a gauge.
        """
        known = {kind.kind for kind in KINDS} | {gauge.name for gauge in self.gauges}
        for name in names:
            if name not in known:
                raise UsageError(
                    f"unknown gauge {name!r}; there are {', '.join(k.kind for k in KINDS)}"
                )
        chosen = (g for g in self.gauges if g.kind in names or g.name in names)
        return replace(self, gauges=tuple(chosen))

    def without(self, kinds: Collection[str]) -> Group:
        """The gauges of all other kinds."""
        return replace(self, gauges=tuple(g for g in self.gauges if g.kind not in kinds))

    def draw(self, rng: torch.Generator) -> tuple[Element, ...]:
        """One element of every gauge."""
        return tuple(gauge.draw(rng) for gauge in self.gauges)

    def apply(self, state: Mapping[str, Tensor], elements: Sequence[Element]) -> State:
        """The State with every element applied; in float64, cast once at the end."""
        out = _Precise(state)
        for gauge, element in zip(self.gauges, elements, strict=True):
            gauge.move(out, beside(element, state))
        return out.stored()

    def undo(self, state: Mapping[str, Tensor], elements: Sequence[Element]) -> State:
        """The inverse of :meth:`apply`."""
        out = _Precise(state)
        for gauge, element in reversed(list(zip(self.gauges, elements, strict=True))):
            gauge.move(out, gauge.inverse(beside(element, state)))
        return out.stored()

    def align(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> State:
        """The point of the orbit of ``state`` that is nearest to ``anchor``.

        First by closed forms that do not depend on where in its orbit ``state`` is: both are
        brought into the standard form of every abelian gauge, there the others are matched, and the
        anchor's own way into standard form is gone back. Then every gauge in turn takes the element
        of least distance, from a start that is near.
        """
        own, trail, _ = self._meet(state, anchor)
        return self._back(own, trail, anchor)

    def least(
        self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> tuple[Group, State]:
        """The smallest that will do of no gauges, permutations, those of the blocks and all, and
        what it finds: one that brings ``state`` as near to ``anchor`` as all do, up to ``ENOUGH``.
        """
        own, trail, found = self._meet(state, anchor)
        whole = self._back(own, trail, anchor)
        enough = ENOUGH * distance(whole, anchor)
        if distance(state, anchor) <= enough:
            return replace(self, gauges=()), dict(state)
        fewer = self.subset(PERMUTATIONS)
        renamed = _moved(state, (pair for pair in found if pair[0].kind in PERMUTATIONS))
        if any(isinstance(gauge, StreamRotation) for gauge in self.gauges):
            renamed = fewer.align(state, anchor)  # what was found is a rotation, not its order
        if distance(renamed, anchor) <= enough:
            return fewer, renamed
        inside = self.subset(BLOCKS)
        if inside.gauges != self.gauges:
            start = _moved(state, (pair for pair in found if pair[0].kind in BLOCKS))
            start = self.subset((KeyBias.kind, UnitScale.kind)).align(start, anchor)
            # Else more than blocks was moved, and to match their units in vain takes seconds.
            if distance(start, anchor) <= 2 * enough:
                blocks = inside.align(start, anchor)
                if distance(blocks, anchor) <= enough:
                    return inside, blocks
        return self, whole

    def match(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Matched:
        """The elements that bring ``state`` to ``anchor``, of the gauges that are not abelian."""
        return self._meet(state, anchor)[2]

    def meet(
        self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> tuple[State, State]:
        """Both in standard form and matched: between them are τ and what this group lacks."""
        own, trail, _ = self._meet(state, anchor)
        goal = _Precise(anchor)
        for gauge, element in trail:
            gauge.move(goal, element)
        return own.stored(), goal.stored()

    def _meet(
        self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> tuple[_Precise, list[tuple[Abelian, Element]], Matched]:
        """``state`` in standard form and matched, the anchor's way there, what was matched."""
        own, goal = _Precise(state), _Precise(anchor)
        trail: list[tuple[Abelian, Element]] = []
        for gauge in self.gauges:
            if isinstance(gauge, Abelian):
                gauge.move(own, gauge.standard(own))
                trail.append((gauge, gauge.standard(goal)))
                gauge.move(goal, trail[-1][1])
        found: list[tuple[Gauge, Element]] = []
        for each in self._matched():
            found.append((each, each.nearest(own, goal)))
            each.move(own, found[-1][1])
        return own, trail, found

    def _back(
        self, own: _Precise, trail: list[tuple[Abelian, Element]], anchor: Mapping[str, Tensor]
    ) -> State:
        """From where ``own`` met the anchor to the anchor itself, and the least distance there."""
        for gauge, element in reversed(trail):
            gauge.move(own, gauge.inverse(element))
        goal = _Precise(anchor)
        for _ in range(_SWEEPS):
            for each in self.gauges:
                if isinstance(each, (StreamRotation, Abelian, BridgeBasis, QueryKey, ValueOutput)):
                    each.move(own, each.closest(own, goal))
        return own.stored()

    def _matched(self) -> Iterator[Gauge]:
        """The gauges that are found by comparison, outer ones first.

        A rotation holds the permutations and signs of its stream.
        """
        turned = [gauge.stream for gauge in self.gauges if isinstance(gauge, StreamRotation)]
        for gauge in self.gauges:
            if isinstance(gauge, (StreamPermutation, StreamSign)) and gauge.stream in turned:
                continue
            if not isinstance(gauge, Abelian):
                yield gauge


def distance(state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> float:
    """‖θ − θ0‖, no entry counted for more than the root mean square of its tensor in ``anchor``.

    So that a few columns that are blown up do not drown what all the others say.
    """
    total = 0.0
    for key, tau in task_vector(state, anchor).items():
        usual = float(anchor[key].float().square().mean())
        total += float(tau.float().square().clamp(max=usual).sum(dtype=torch.float64))
    return total**0.5


def _moved(state: Mapping[str, Tensor], elements: Iterable[tuple[Gauge, Element]]) -> State:
    out = _Precise(state)
    for gauge, element in elements:
        gauge.move(out, element)
    return out.stored()


def align(state: Mapping[str, Tensor], anchor: Mapping[str, Tensor], anatomy: Anatomy) -> State:
    """What computes the function of ``state`` near ``anchor``, by no more gauges than it takes.

    The element of least distance takes from an expert's task vector all that lies along the group
    (METHODS section 3, trap 1: the more, the larger the group), lock or no lock. So where it brings
    a State hardly nearer it is not taken: an undefended expert stays as it is, permutations are
    undone by permutations, and what was locked inside blocks moves inside them alone.
    """
    return of(anatomy, state).least(state, anchor)[1]  # it may have untied what the base has tied


def of(model: nn.Module | Anatomy, state: Mapping[str, Tensor]) -> Group:
    """The gauges of a model, as far as rows answer for it; of its own outputs, not of what a
    wrapper reads inside it.

    Raises:
        UsageError: no row of :mod:`benchmark.anatomy.families` fits the model.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    wired = wiring(anatomy, state)
    channels = (*anatomy.channels, *wired.channels)
    found: list[Gauge] = list(_inside(anatomy, channels, state))
    for stream in wired.streams:
        found += _stream(stream)
        for segment in stream.segments:
            found += _segment(segment, state)
    for block, pairs in wired.qk_gains:
        for own, both in zip(block.streams(), pairs, strict=True):
            where = own.q.weight.key.removesuffix(".weight")
            sizes = (len(both[0].read(state)), len(both[1].read(state)))
            found += [QueryKeySign(where, own, both, sizes), QueryKeyLength(where, own)]
        found += [QueryKeyGain(block.q.weight.key.removesuffix(".weight"), block, pairs)]
    found += [Statistics(norm.name, norm, len(norm.mean.read(state))) for norm in wired.batch_norms]
    for bridge in wired.bridges:
        weight = bridge.linear.weight
        found += [BridgeBasis(weight.key.removesuffix(".weight"), bridge, len(weight.read(state)))]
    found += [
        FilterScale(n.name, n, n.groups or len(n.gain.read(state))) for n in wired.instance_norms
    ]
    order: dict[type[Gauge], int] = {kind: i for i, kind in enumerate(KINDS)}

    def place(gauge: Gauge) -> tuple[int, int]:
        # The heads of an attention pool are known by the channels that they read.
        outer = isinstance(gauge, UnitOrder) and bool(channels)
        return (order[HeadOrder], 0) if outer else (order[type(gauge)], 1)

    return Group(tuple(sorted(found, key=place)), wired.uncovered)


def _inside(
    anatomy: Anatomy, channels: Sequence[Channels], state: Mapping[str, Tensor]
) -> Iterator[Gauge]:
    """The gauges of the blocks, and the order of channels."""
    for block in anatomy.attention:
        where = block.o.weight.key.removesuffix(".weight")
        if not block.fixed_heads and block.kv_heads > 1:
            yield HeadOrder(where, block)
            if block.group > 1:
                yield QueryOrder(where, block)
        yield QueryKey(where, block)
        yield ValueOutput(where, block)
        if block.biases("k") and bool(block.free_rows.any()):
            yield KeyBias(where, block)
        if block.biases("v") and block.biases("o"):
            yield ValueShift(where, block)
    if channels:
        ordered: tuple[MLPBlock | Channels, ...] = (*anatomy.mlp, *channels)
        widths = tuple(units.width(state) for units in ordered)
        yield UnitOrder("channels", ordered, widths)
    else:
        for mlp in anatomy.mlp:
            where = mlp.up.weight.key.removesuffix(".weight")
            yield UnitOrder(where, (mlp,), (mlp.width(state),))
    for units in anatomy.units:
        if units.unit_scale is not None:
            where = units.axes[0].slot.key.removesuffix(".weight")
            yield UnitScale(where, units, units.width(state))


def _stream(stream: Stream) -> Iterator[Gauge]:
    """The gauges of the axis."""
    if not stream.closed:
        return
    yield StreamPermutation(stream.name, stream)
    if stream.activated:
        return
    yield StreamSign(stream.name, stream)
    # A gain on the path, or one that a tied output reads, stands between the stream and R.
    if not any(
        s.tied or (s.sources and (s.embeddings or s.writers or s.norms)) for s in stream.segments
    ):
        yield StreamRotation(stream.name, stream)


def _segment(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    """The gauges of a stretch of the stream."""
    if segment.open:
        return
    for rule in (_gains, _shifts, _nulls, _constants, _scale):
        yield from rule(segment, state)
    for first, second in segment.together:
        if not any(part.axis in segment.tied for part in (*first, *second)):
            yield EmbeddingShift(first[0].axis.slot.key, first, second, segment.width)


def _gains(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    for writer in segment.writers:
        if writer.scale is not None:
            axes = [Axis(writer.scale, 0, 1)]
            axes += [Axis(slot, 0, -1) for slot in writer.linear.slots()]
            units = Channels(writer.scale.key, tuple(axes))
            yield LayerScale(writer.scale.key, units, segment.width, writer.scale)
        if writer.gate is not None:
            # Its constant may be as good as zero, so that nothing is pinned to it.
            axes = [Axis(slot, 0, 1) for slot in writer.gate.slots()]
            axes += [Axis(slot, 0, -1) for slot in writer.linear.slots()]
            where = writer.linear.weight.key
            yield LayerScale(where, Channels(where, tuple(axes)), segment.width)
    pure = not (segment.embeddings or segment.writers or segment.norms or segment.tied)
    if pure and segment.readers and len(segment.sources) == 1:
        (norm,) = segment.sources
        axes = [Axis(slot, 0, 1) for slot in norm.slots()]
        axes += [Axis(reader.weight, 1, -1) for reader in segment.readers]
        yield NormGain(norm.name, Channels(norm.name, tuple(axes)), segment.width, norm.gain)


def _shifts(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    if len(segment.sources) != 1 or segment.embeddings or segment.tied or not segment.readers:
        return
    (norm,) = segment.sources
    if norm.bias is None or any(r.bias is None for r in segment.readers if r not in segment.free):
        return
    if not segment.norms and not segment.writers:
        yield NormShift(norm.name, norm, segment.readers, segment.width)
    elif len(segment.norms) == len(segment.writers) == 1:
        after = segment.writers[0].linear.bias
        if after is not None:
            yield NormShift(norm.name, norm, segment.readers, segment.width, after)


def _nulls(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    if len(segment.sources) != 1 or segment.embeddings or not segment.sources[0].centred:
        return
    (norm,) = segment.sources
    if norm.also:
        return  # nothing is constant of what a gain gives that is none
    for reader in segment.readers:
        if norm.bias is None or reader.bias is not None or reader in segment.free:
            _, outputs, taps = columns(reader, state).shape
            yield NullDirection(reader.weight.key, norm, reader, (outputs, taps))


def _constants(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    if not segment.norms or not all(norm.centred for norm in segment.norms):
        return
    found: list[tuple[Axis, Slot | None]] = [
        (Axis(slot, 0), w.scale) for w in segment.writers for slot in w.linear.slots()
    ]
    also = {group[0]: group[1:] for group in segment.aliases}
    twice = {axis for group in also.values() for axis in group}
    if not segment.readers:
        kept = {*segment.tied, *twice}
        found += [(axis, None) for axis in segment.embeddings if axis not in kept]
        found += [(Axis(n.bias, 0), None) for n in segment.sources if n.bias is not None]
    if segment.depthwise is not None and segment.depthwise.bias is not None:
        found.append((Axis(segment.depthwise.bias, 0), None))
    for axis, scale in found:
        size = matrix(axis, state).shape[1]
        yield Constant(axis.slot.key, axis, size, scale, also.get(axis, ()))


def _scale(segment: Segment, state: Mapping[str, Tensor]) -> Iterator[Gauge]:
    if not segment.norms or segment.given or segment.activated:
        return
    gains = tuple(Axis(slot, 0) for norm in segment.sources for slot in norm.slots())
    writers = tuple(Axis(slot, 0) for w in segment.writers for slot in w.linear.slots())
    alone: tuple[Axis, ...] = ()
    if segment.depthwise is not None:
        alone = tuple(Axis(slot, 0) for slot in segment.depthwise.slots())
    down = tuple(Axis(reader.weight, 1) for reader in segment.readers)
    if segment.tied:
        down += tuple(Axis(slot, 0) for norm in segment.after_tied for slot in norm.slots())
    made = segment.embeddings or gains[:1] or alone or writers[:1]
    if segment.readers:  # OLMo-2 reads what norms add to the embeddings
        made = gains[:1] or made
    attention = segment.writers[0].attention if made == writers[:1] and segment.writers else None
    kind = NormScale if made == gains[:1] else SegmentScale
    up = (*segment.embeddings, *gains, *alone, *writers)
    yield kind(segment.name, up, down, made, attention)


class _Precise(dict[str, Tensor]):
    """A State in float64, as far as it is looked at."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.source = source

    def __missing__(self, key: str) -> Tensor:
        value = self.source[key]
        self[key] = value.double() if value.is_floating_point() else value
        return self[key]

    def stored(self) -> State:
        """In the dtypes of the source, with whose tensors nobody looked at."""
        return {key: self[key].to(v.dtype) if key in self else v for key, v in self.source.items()}
