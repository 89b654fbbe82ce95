"""Merging a piece at a time, so that no task vector is ever stored whole.

A merge reads base and experts once and writes the result: it runs at the speed of memory, and
needs no more of it than the result takes. On a CPU the pieces and the few temporaries of a formula
stay in a core's cache; on a GPU, where a launch costs more than a pass, a piece is a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmark.core.state import State

#: Entries of a piece on a CPU: 512 KiB of float32. Long enough for torch to share each operation
#: out among its threads (Python's would wait for the interpreter's lock), short enough for a cache.
PIECE = 2**17


class Flat(Protocol):
    """One flattened tensor of a task vector: read by slices, ``flat[a:b]``."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


#: A task vector, whose tensors are stored (of any shape) or computed when read.
Tau = Mapping[str, Flat]

#: (a piece of the base, coefficient and piece of each member) → that piece of the merged model.
Combine = Callable[[Tensor, list[tuple[float, Tensor]]], Tensor]


@dataclass(frozen=True)
class Difference:
    """One tensor of τ = θ − θ0, flat; computed, in the dtype of its operands, when it is read."""

    expert: Tensor
    base: Tensor

    def __getitem__(self, part: slice, /) -> Tensor:
        return self.expert[part] - self.base[part]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[part] for part in pieces(self.base))

    def __len__(self) -> int:
        return self.base.numel()

    def moved(self) -> bool:
        """Whether any entry of the expert differs from the base's."""
        parts = pieces(self.base)
        return not all(torch.equal(self.expert[part], self.base[part]) for part in parts)


@dataclass(frozen=True)
class Cut:
    """The entries of ``delta`` of magnitude at least ``least`` and under ``most``; 0 elsewhere."""

    delta: Difference
    least: float
    most: float = float("inf")

    def __getitem__(self, part: slice, /) -> Tensor:
        # hardshrink keeps what exceeds its bound: several times faster than a mask and where.
        value = wide(self.delta[part])
        kept = torch.hardshrink(value, _below(self.least, value.dtype))
        if self.most < float("inf"):
            kept -= torch.hardshrink(kept, _below(self.most, value.dtype))
        return kept


def differences(expert: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Difference]:
    """:func:`benchmark.core.state.task_vector`, unevaluated: only tensors that moved."""
    floats = {key: value for key, value in expert.items() if value.is_floating_point()}
    found = {
        key: Difference(value.reshape(-1), base[key].reshape(-1))
        for key, value in floats.items()
        if value is not base[key]
    }
    return {key: delta for key, delta in found.items() if delta.moved()}


def moved(taus: Iterable[Mapping[str, object]]) -> list[str]:
    """The tensors that at least one τ holds, in the order met."""
    return list(dict.fromkeys(key for tau in taus for key in tau))


def streamed(base: State, members: Sequence[tuple[float, Tau]], combine: Combine) -> State:
    """The merged State of (coefficient, τ) pairs, by ``combine``, each tensor a piece at a time.

    ``combine`` gets pieces in float32 (float64 where the base is), of the members that moved that
    tensor. Tensors that no member moved are shared with ``base``.
    """
    out = dict(base)
    for key in moved(tau for _, tau in members):
        present = [(c, _flat(tau[key])) for c, tau in members if key in tau]
        start = base[key].reshape(-1)
        merged = torch.empty_like(start)
        for part in pieces(start):
            own = [(c, wide(delta[part])) for c, delta in present]
            merged[part] = combine(wide(start[part]), own)
        out[key] = merged.reshape(base[key].shape)
    return out


def pieces(flat: Tensor) -> list[slice]:
    """Slices that cover a flat tensor."""
    step = PIECE if flat.device.type == "cpu" else max(1, len(flat))
    return [slice(start, start + step) for start in range(0, len(flat), step)]


def wide(value: Tensor) -> Tensor:
    """Half precision as float32, so that sums are rounded once; other dtypes as they are."""
    return value.float() if value.element_size() < 4 else value


def _flat(delta: Flat) -> Flat:
    return delta.reshape(-1) if isinstance(delta, Tensor) else delta


def _below(bound: float, dtype: torch.dtype) -> float:
    """The next number under ``bound``: exceeding it is being at least ``bound``."""
    if bound == float("inf"):
        return bound
    limit = torch.tensor([bound, -float("inf")], dtype=dtype)
    return float(torch.nextafter(limit[0], limit[1]))
