"""How the residual stream of a transformer is wired: what a row of the table says of a model.

A stream is cut into *segments* by the norms on its path. What comes into a segment is linear in it
(the embeddings, the gain and bias of the norm that gives it, what writers add); a norm that reads
it ignores its scale (and its mean, if it is a LayerNorm)::

    pre-LN     embeddings + all writers → [main] → norm_i → [norm_i] → q, k, v
    post-LN    norm_i → [norm_i] → q, k, v;  [norm_i] + writer → norm_{i+1} → …

So which gauges a place has follows from its segment alone (:mod:`.group`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Axis, Channels, Linear, MLPBlock, Slot
from benchmark.core.state import State


@dataclass(frozen=True)
class Shifted(Slot):
    """A tensor that the model adds ``offset`` to before use: Gemma's gains are 1 + w."""

    offset: float = 1.0

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return super().read(state).double() + self.offset

    def write(self, state: State, value: Tensor) -> None:
        super().write(state, value - self.offset)


@dataclass(frozen=True)
class Norm:
    """A norm on or beside the stream. ``centred``: it removes the mean (LayerNorm, not RMSNorm).

    ``also``: what makes gain and bias besides, row by row (adaLN: gain and bias are linear maps of
    time and text, of which ``gain`` and ``bias`` are the constants).
    """

    name: str
    gain: Slot
    bias: Slot | None
    centred: bool
    also: tuple[Slot, ...] = ()

    def slots(self) -> tuple[Slot, ...]:
        return (self.gain, *(() if self.bias is None else (self.bias,)), *self.also)


@dataclass(frozen=True)
class Writer:
    """What adds to a segment: λ ⊙ (W·h + b), λ the layer scale or none.

    ``attention``: the block whose output it is, where it is one. ``gate``: the linear map of time
    and text that gives λ, where it is one (adaLN).
    """

    linear: Linear
    scale: Slot | None = None
    gate: Linear | None = None
    attention: AttentionBlock | None = None


@dataclass(frozen=True)
class Part:
    """Columns ``start:stop`` of an embedding seen as (d, n), which enter the stream × ``scale``."""

    axis: Axis
    start: int = 0
    stop: int | None = None
    scale: float = 1.0

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        found = matrix(self.axis, state)[:, self.start : self.stop]
        return found if self.scale == 1.0 else self.scale * found

    def add(self, state: State, vector: Tensor) -> None:
        """Add (d,) to each column, as the stream has it."""
        value = matrix(self.axis, state).clone()
        value[:, self.start : self.stop] += vector[:, None] / self.scale
        write_matrix(self.axis, state, value)


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream, its axis of size ``width``.

    Attributes:
        sources: norms that give it, or add to it (Gemma's, behind the writers).
        embeddings: tensors whose entries are added to it, by the axis that lies along it.
        writers: what adds to it. In a post-LN segment its one norm reads it behind the writer,
            its readers before.
        readers: linear maps that read it.
        norms: norms that read it.
        together: pairs of embeddings of which one of each is always added.
        aliases: names of embeddings that are one tensor.
        activated: what enters it through an activation, by the axis that lies along it.
        given: something outside the State enters it.
        tied: embeddings that are the output matrix too: of the segment they enter, and of the last
            one, which they read.
        after_tied: the norm before a tied output, which divides what scales the embeddings.
        free: readers without a bias that need none: a constant that is added to keys is ignored.
        head: its readers are the model's heads.
        open: something outside the State reads it (or nothing says what does).
        depthwise: a convolution that writes each channel by itself (ConvNeXt).
    """

    name: str
    width: int
    sources: tuple[Norm, ...] = ()
    embeddings: tuple[Axis, ...] = ()
    writers: tuple[Writer, ...] = ()
    readers: tuple[Linear, ...] = ()
    norms: tuple[Norm, ...] = ()
    together: tuple[tuple[tuple[Part, ...], tuple[Part, ...]], ...] = ()
    tied: tuple[Axis, ...] = ()
    after_tied: tuple[Norm, ...] = ()
    aliases: tuple[tuple[Axis, ...], ...] = ()
    activated: tuple[Axis, ...] = ()
    given: bool = False
    free: tuple[Linear, ...] = ()
    head: bool = False
    open: bool = False
    depthwise: Linear | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Everything that lies along it but the gains of norms."""
        found = [*self.embeddings, *self.activated]
        found += [Axis(n.bias, 0) for n in self.sources if n.bias is not None]
        for writer in self.writers:
            found += [Axis(slot, 0) for slot in writer.linear.slots()]
        return (*found, *(Axis(reader.weight, 1) for reader in self.readers))


@dataclass(frozen=True)
class Stream:
    """Segments that share one axis, and the MLPs on it. ``renamed``: the axis may be permuted."""

    name: str
    segments: tuple[Segment, ...]
    mlps: tuple[MLPBlock, ...] = ()
    renamed: bool = True

    @property
    def width(self) -> int:
        return self.segments[0].width

    @property
    def centred(self) -> bool:
        """Whether any norm removes the mean."""
        return any(n.centred for s in self.segments for n in (*s.sources, *s.norms))

    @property
    def closed(self) -> bool:
        """Whether all that lies along the axis is in the State."""
        return self.renamed and not any(s.open or s.given for s in self.segments)

    @property
    def activated(self) -> bool:
        """Whether anything enters it through an activation, which knows no signs or rotations."""
        return any(segment.activated for segment in self.segments)


@dataclass(frozen=True)
class BatchNorm:
    """A convolution and the batch norm behind it."""

    name: str
    conv: Linear
    gain: Slot
    bias: Slot
    mean: Slot
    variance: Slot


@dataclass(frozen=True)
class InstanceNorm:
    """A convolution and the norm behind it, over each of ``groups`` of channels: by default every
    channel has one by itself.

    ``also``: what more is added to the channels before the norm, and what the convolution adds.
    """

    name: str
    conv: Linear
    gain: Slot
    groups: int | None = None
    also: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class Bridge:
    """A linear map, and the linear maps that are all that read it."""

    linear: Linear
    readers: tuple[Linear, ...]

    def widens(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it gives more dimensions than it is given, so that what reads it has columns
        that nothing reaches."""
        outputs, inputs = self.linear.weight.read(state).shape
        return outputs > inputs + (self.linear.bias is not None)


@dataclass(frozen=True)
class Wiring:
    """All streams, norms between convolutions and bridges of a model, and gains of QK-norms, a
    pair for each stream in the heads.

    ``channels``: axes whose order alone is free, beside those of the anatomy.

    ``uncovered``: which part of it has no gauges, and why.
    """

    streams: tuple[Stream, ...] = ()
    batch_norms: tuple[BatchNorm, ...] = ()
    instance_norms: tuple[InstanceNorm, ...] = ()
    bridges: tuple[Bridge, ...] = ()
    qk_gains: tuple[tuple[AttentionBlock, tuple[tuple[Slot, Slot], ...]], ...] = ()
    channels: tuple[Channels, ...] = ()
    uncovered: tuple[str, ...] = ()


def matrix(axis: Axis, state: Mapping[str, Tensor]) -> Tensor:
    """The tensor as (d, m), float64, ``axis`` first."""
    value = axis.read(state).double()
    return value.reshape(len(value), -1)


def write_matrix(axis: Axis, state: State, value: Tensor) -> None:
    """The inverse of :func:`matrix`."""
    axis.write(state, value.reshape(axis.read(state).shape))


def vector(slot: Slot, state: Mapping[str, Tensor]) -> Tensor:
    """A gain or bias, float64."""
    return slot.read(state).double()


def whole(linear: Linear) -> Linear:
    """The layer a projection is a part of: all rows of a fused tensor."""

    def all_rows(slot: Slot) -> Slot:
        return replace(slot, rows=None, every=None)

    return Linear(all_rows(linear.weight), None if linear.bias is None else all_rows(linear.bias))


def columns(linear: Linear, state: Mapping[str, Tensor]) -> Tensor:
    """What a layer reads: (d, out, taps) float64; taps is 1 but for a spatial convolution."""
    value = linear.weight.read(state).double().movedim(1, 0)
    return value.reshape(*value.shape[:2], -1)


def write_columns(linear: Linear, state: State, value: Tensor) -> None:
    """The inverse of :func:`columns`."""
    shape = linear.weight.read(state).movedim(1, 0).shape
    linear.weight.write(state, value.reshape(shape).movedim(0, 1))


def add_to(slot: Slot | None, state: State, value: Tensor) -> None:
    """Add to a bias, in float64."""
    assert slot is not None
    slot.write(state, slot.read(state).double() + value)


def unit(value: Tensor) -> Tensor:
    """A vector of length 1."""
    return value / torch.linalg.vector_norm(value)
