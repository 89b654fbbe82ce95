"""Locks on an adapter alone: only A and B move, the public base stays as it is.

A release W0 + B·A in two pieces cannot be locked as a whole, for its user takes W0 from the public.
What is left is to transform the update as if it were the weights::

    τ_q → A·τ_q, τ_k → A^-T·τ_k, τ_v → B·τ_v, τ_o → τ_o·B^-1        θ* = θ0 + τ'

which keeps its rank, and not the function: Q·K holds the cross terms W0ᵀ·A·τ, which nothing undoes.
So the release loses standalone accuracy; how much is measured, like any defense's utility.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from benchmark.api.contracts import Card
from benchmark.core.errors import MethodError
from benchmark.core.lowrank import rounding, thin_svd
from benchmark.core.state import State


@dataclass(frozen=True, kw_only=True)
class AdapterOnly:
    """A lock that can be put on the update alone.

    Attributes:
        adapter_only: transform τ = θ − θ0 and leave θ0: the adapter of a LoRA release (not exact).
    """

    adapter_only: bool = False

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        if self.adapter_only:
            notes = "; ".join([self.card.notes, "on the adapter alone: function not kept"])
            card = replace(self.card, exact=False, notes=notes.removeprefix("; "))
            object.__setattr__(self, "card", card)

    def locked(self, state: State, base: State | None, lock: Callable[[State], None]) -> State:
        """``state`` with ``lock`` applied, which edits the shallow copy it gets: of ``state``, or
        of its update (float64; 0 where nothing moved).

        Raises:
            MethodError: an update is wanted, and there is no base.
        """
        if not self.adapter_only:
            part = dict(state)
            lock(part)
            return part
        if base is None:
            raise MethodError("a lock on the adapter alone is undone with its base: give base")
        update = {key: _update(value, base[key]) for key, value in state.items()}
        part = dict(update)
        lock(part)
        moved = {key: value for key, value in part.items() if value is not update[key]}
        return {
            **state,
            **{key: (base[key].double() + v).to(base[key].dtype) for key, v in moved.items()},
        }


def _update(value: Tensor, base: Tensor) -> Tensor:
    """τ; of a matrix without what rounding W0 + B·A added, which a lock would blow up to rank."""
    if not value.is_floating_point():
        return value
    delta = value.double() - base.double()
    if value.ndim != 2 or not delta.any():
        return delta
    u, s, v = thin_svd(delta, rounding(value, base))
    return (u * s) @ v
