"""Attention blocks, MLP blocks and convolutional channels as references into a State.

A method is written once, against blocks. What differs between architectures (fused QKV, transposed
Conv1D weights, missing biases, grouped heads) is hidden in :class:`Slot` and :class:`Linear`.
Rows are always output units, as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy.nest import Nest
from benchmark.core.state import State

Gauge = Literal["general", "rotary", "sign"]


@dataclass(frozen=True)
class Slot:
    """Part of one tensor of a State: ``rows`` of its output axis, seen with output units first.

    ``every``: those rows of every so many, as where queries, keys and values take turns per head.
    ``index``: that of the tensor where several lie in one (the experts of a mixture).
    ``columns``: of its input axis, where what two layers read lies side by side.
    """

    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    every: int | None = None
    index: int | None = None
    columns: tuple[int, int] | None = None

    def cut(self, value: Tensor, dim: Literal[0, -1] = 0) -> Tensor:
        """The slot's part of the output units, which lie along ``dim``: a view, of one axis more
        where there is an ``every``."""
        if self.rows is None:
            return value
        if self.every is not None:
            value = value.unflatten(dim, (-1, self.every))
        axis = 1 if self.every is not None and dim == 0 else dim
        return value.narrow(axis, self.rows[0], self.rows[1] - self.rows[0])

    def entering(self, value: Tensor) -> Tensor:
        """The slot's part of the input units, which lie along the last axis: a view."""
        return value if self.columns is None else value[..., slice(*self.columns)]

    def _inner(self, value: Tensor) -> Tensor:
        """Of a weight, (out, in) or (out, in, kh, kw), its columns: a view."""
        return value if self.columns is None else value[:, slice(*self.columns)]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """(out, in) for a weight, (out, in, kh, kw) for that of a convolution, (out,) for a bias:
        a view, but for a slot with an ``every``."""
        value = state[self.key] if self.index is None else state[self.key][self.index]
        value = self._inner(self.cut(value.T if self.transposed else value))
        return value if self.every is None else value.flatten(0, 1)

    def write(self, state: State, value: Tensor) -> None:
        """Replace the slot in ``state``. The tensor that was there is never written to."""
        old = state[self.key]
        if self.rows is None and self.index is None and self.columns is None:
            fresh = value.T if self.transposed else value
            state[self.key] = fresh.to(old.dtype).contiguous().reshape(old.shape)
        else:
            fresh = old.clone()
            inner = fresh if self.index is None else fresh[self.index]
            part = self._inner(self.cut(inner.T if self.transposed else inner))
            part.copy_(value.reshape(part.shape))
            state[self.key] = fresh


@dataclass(frozen=True)
class Linear:
    """A linear map: a weight slot (out, in) and a bias slot (out,) or None."""

    weight: Slot
    bias: Slot | None = None

    @staticmethod
    def named(
        name: str, state: Mapping[str, Tensor], rows: tuple[int, int] | None = None
    ) -> Linear:
        """The layer ``name``, with a bias where ``state`` has one; ``rows`` of it alone."""
        weight, bias = (f"{name}.{part}" for part in ("weight", "bias"))
        return Linear(Slot(weight, rows), Slot(bias, rows) if bias in state else None)

    def slots(self) -> Iterator[Slot]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True)
class Axis:
    """One axis of a slot, along which the units of a block lie.

    ``power``: 1 where entries are multiplied by c when the units are scaled by c, -1 where they are
    divided, 0 where they stay. ``mixed``: another gauge mixes what lies across, so that it tells no
    unit from another (the heads of an attention pool).
    """

    slot: Slot
    dim: int
    power: int = 0
    mixed: bool = False

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """What belongs to each unit: a view (n, ...)."""
        return self.slot.read(state).movedim(self.dim, 0)

    def write(self, state: State, value: Tensor) -> None:
        """The inverse of :meth:`read`."""
        self.slot.write(state, value.movedim(0, self.dim))


@dataclass(frozen=True)
class Channels:
    """Units that trade places together: one permutation along every axis keeps the function.

    The channels of a stage's residual stream, or those between two convolutions of a block; as one
    entry of Git Re-Basin's permutation spec (Ainsworth et al. 2023, arXiv 2209.04836). ``relu``:
    what the units enter is linear in them up to a ReLU, so that a positive factor is free too.
    ``nest``: the groups of norms that bind them, None where every permutation is free.
    """

    name: str
    axes: tuple[Axis, ...]
    relu: bool = False
    nest: Nest | None = None

    @property
    def unit_scale(self) -> Literal["positive"] | None:
        """Which factors per unit keep the function."""
        return "positive" if self.relu else None

    def width(self, state: Mapping[str, Tensor]) -> int:
        """Number of units n."""
        return len(self.axes[0].read(state))

    def read_units(self, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """All parameters of each unit side by side: (n, features)."""
        parts = (axis.read(state).to(dtype) for axis in self.axes)
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def read_rows(self, state: Mapping[str, Tensor]) -> Tensor:
        """The weights that make each unit, without biases and norms: (n, features)."""
        made = [axis for axis in self.axes if axis.dim == 0 and axis.slot.read(state).ndim > 1]
        return torch.cat([axis.read(state).flatten(1) for axis in made], dim=1)


@dataclass(frozen=True)
class Joint:
    """The projections of a second stream, whose tokens meet those of the first in the same heads.

    As in MM-DiT (Esser et al. 2024, arXiv 2403.03206): text and image have weights of their own.
    ``o``: None where nothing reads what this stream would be given (the last layer).
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear | None

    def linears(self) -> dict[str, Linear]:
        found = {"joint q": self.q, "joint k": self.k, "joint v": self.v}
        return found if self.o is None else {**found, "joint o": self.o}


@dataclass(frozen=True)
class AttentionBlock:
    """One attention layer.

    ``q`` has ``heads·head_dim`` rows, ``k`` and ``v`` have ``kv_heads·head_dim``, ``o`` has
    ``heads·head_dim`` columns. ``rotary`` and ``qk_norm`` restrict the Q/K gauge group (METHODS 1).
    ``rotated``: so many rows of each head, the first ones, are rotated (None: all); the others are
    free among themselves. ``interleaved``: rotary pairs are (i, i + 1), not (i, i + rotated/2).
    ``whole_norm``: the QK-norm is over all heads together, with a gain for every row.
    ``met``: more than queries meets the keys (DeBERTa's positions), so that their bias counts.
    ``cosine``: queries and keys are brought to unit length, with no gain (SwinV2).
    ``fixed_heads``: something outside the block is per head (T5's relative positions, shared by all
    layers; the slopes of ALiBi), so that heads cannot trade places.
    ``joint``: a second stream in the same heads, which every gauge of the block moves along.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    rotary: bool = False
    qk_norm: tuple[Slot, Slot] | None = None
    fixed_heads: bool = False
    rotated: int | None = None
    interleaved: bool = False
    whole_norm: bool = False
    cosine: bool = False
    met: bool = False
    joint: Joint | None = None

    @property
    def normed(self) -> bool:
        """Whether queries and keys are normalised before they meet."""
        return self.qk_norm is not None or self.cosine

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def turning(self) -> int:
        """How many rows of each head are rotated."""
        if not self.rotary:
            return 0
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def order(self) -> Tensor:
        """The rows of a head: the first of each rotary pair, the second of each, the rest."""
        rows = torch.arange(self.head_dim)
        if not self.interleaved:
            return rows
        turning, rest = rows.split((self.turning, self.head_dim - self.turning))
        return torch.cat([turning[::2], turning[1::2], rest])

    @property
    def qk_gauge(self) -> Gauge:
        """Which per-head maps of Q (with the inverse transpose on K) keep the function."""
        if self.normed:
            return "sign"
        return "rotary" if self.rotary else "general"

    @property
    def free_key_bias(self) -> bool:
        """Whether the key bias is a gauge of its own: it adds one number to all logits of a query,
        which softmax ignores. Not so when keys are rotated or normalised after it."""
        return not self.turning and not self.normed and not self.met

    @property
    def free_rows(self) -> Tensor:
        """The rows of a head whose key bias is free: all, none, or those that are not rotated."""
        return (torch.arange(self.head_dim) >= self.turning) & (not self.normed and not self.met)

    def linears(self) -> dict[str, Linear]:
        own = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        return own if self.joint is None else {**own, **self.joint.linears()}

    def biases(self, name: Literal["k", "v", "o"]) -> tuple[Slot, ...]:
        """The bias of one projection, of both streams where there are two; none unless each has
        one."""
        streams = self._streams(name)
        found = tuple(linear.bias for linear in streams if linear.bias is not None)
        return found if len(found) == len(streams) else ()

    def streams(self) -> tuple[AttentionBlock, ...]:
        """The block of each stream by itself: two where another meets it in the same heads.

        They share heads, so that what is moved in one alone must be nothing the other sees.
        """
        own, second = replace(self, joint=None), self.joint
        if second is None:
            return (own,)
        return own, replace(own, q=second.q, k=second.k, v=second.v, o=second.o or self.o)

    def _streams(self, name: str) -> tuple[Linear, ...]:
        linears = self.linears()
        return tuple(linears[n] for n in (name, f"joint {name}") if n in linears)

    def read(self, state: Mapping[str, Tensor], name: Literal["q", "k", "v"]) -> Tensor:
        """Weight and bias of one projection per KV head, float64: (kv_heads, r, d + 1).

        r = group·head_dim rows for q, head_dim for k and v. The last column is the bias (zero where
        the architecture has none), so a gauge acts on weight and bias in one product. Weight and
        bias of a second stream are further columns, between the two.
        """
        columns = [slot.read(state).double() for slot in self._columns(name)]
        columns = [column.reshape(len(column), -1) for column in columns]
        if self.linears()[name].bias is None:
            columns.append(columns[0].new_zeros(len(columns[0]), 1))
        found = torch.cat(columns, dim=1)
        return found.reshape(self.kv_heads, -1, found.shape[1])

    def _columns(self, name: str) -> tuple[Slot, ...]:
        """What lies side by side in :meth:`read`."""
        own, *other = self._streams(name)
        between = tuple(slot for linear in other for slot in linear.slots())
        return (own.weight, *between, *tuple(own.slots())[1:])

    def write(self, state: State, name: Literal["q", "k", "v"], value: Tensor) -> None:
        """The inverse of :meth:`read`, cast to the dtype of the State."""
        flat, start = value.reshape(-1, value.shape[-1]), 0
        for slot in self._columns(name):
            old = slot.read(state)
            stop = start + (1 if old.ndim == 1 else old.shape[1])
            slot.write(state, flat[:, start:stop].reshape(old.shape))
            start = stop

    def read_o(self, state: Mapping[str, Tensor]) -> Tensor:
        """Output projection per KV head, float64: (kv_heads, group, d, head_dim).

        d counts the outputs of both streams where there are two.
        """
        parts = [linear.weight.read(state).double() for linear in self._streams("o")]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        split = weight.reshape(len(weight), self.kv_heads, self.group, self.head_dim)
        return split.permute(1, 2, 0, 3)

    def write_o(self, state: State, value: Tensor) -> None:
        """The inverse of :meth:`read_o`."""
        rows, start = value.permute(2, 0, 1, 3).reshape(value.shape[2], -1), 0
        for linear in self._streams("o"):
            stop = start + len(linear.weight.read(state))
            linear.weight.write(state, rows[start:stop])
            start = stop


@dataclass(frozen=True)
class MLPBlock:
    """One MLP: ``up`` (n, d), optional ``gate`` (n, d), ``down`` (d, n).

    ``norm``: gain and bias of a norm over the hidden units, before ``down``.
    """

    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: str = "gelu"
    norm: tuple[Slot, ...] = ()

    #: No norm binds hidden units.
    nest: ClassVar[None] = None

    @property
    def unit_scale(self) -> Literal["signed", "positive"] | None:
        """Which factors c per unit, up → c·up and down → down/c, keep the function: any in a gated
        MLP, positive ones under ReLU, none elsewhere (METHODS section 1)."""
        if self.norm:
            return None
        if self.gate is not None:
            return "signed"
        return "positive" if self.activation == "relu" else None

    def rows(self) -> Iterator[Slot]:
        """The slots whose rows are the hidden units (their columns in ``down`` go along)."""
        for linear in (self.up, self.gate):
            if linear is not None:
                yield from linear.slots()

    def read_units(self, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """All parameters of each hidden unit side by side: (n, features)."""
        parts = [slot.read(state).reshape(self.width(state), -1) for slot in self.rows()]
        parts.append(self.down.weight.read(state).T)
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def read_rows(self, state: Mapping[str, Tensor]) -> Tensor:
        """The rows of W1: (n, d)."""
        return self.up.weight.read(state)

    def width(self, state: Mapping[str, Tensor]) -> int:
        """Number of hidden units n."""
        return len(self.up.weight.read(state))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Where the hidden units lie: rows of up and gate, columns of down."""
        up = tuple(Axis(slot, 0, power=1) for slot in self.up.slots())
        gate = tuple(Axis(slot, 0) for slot in (self.gate.slots() if self.gate else ()))
        norm = tuple(Axis(slot, 0) for slot in self.norm)
        return (*up, *gate, *norm, Axis(self.down.weight, 1, power=-1))
