"""Locks drawn from the whole gauge group (METHODS section 1). Ours: nobody has published one.

Post-hoc, without data, exact. θ* = g·θ with one random element g of every gauge chosen: of the
stream (its permutation, signs, rotation), of norms (gain, shift, null direction), of embeddings,
layer scales and batch norms, and inside the blocks as PaRaMS and MergeLock do. Each law is bounded
(:mod:`benchmark.anatomy.gauges`: factors within [1/4, 4], matrices of condition ≤ 9), so the
function is kept to float32's rounding; what is exact only up to the ε of a norm is not offered.
One bound hangs on the model: a rotation of the stream keeps the gains γ of norms, so readers grow
with max γ / min γ (428-fold in a ViT-Tiny, whose release half precision spoils). Leave
``stream-rotation`` out of ``kinds`` there.

The random state is the key, and nothing else has to be stored: :meth:`unlock` replays the draws,
which depend on shapes alone, and inverts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.anatomy import Anatomy, gauges
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State

#: Without the scales that the ε of a norm makes inexact.
_KINDS = tuple(kind.kind for kind in gauges.KINDS if not kind.up_to_eps)
#: Everything that no lock on attention or MLP touches.
OUTSIDE = tuple(kind for kind in _KINDS if kind not in gauges.BLOCKS)


@dataclass(frozen=True)
class FullGauge(Defense):
    """One random element of every gauge in ``kinds``.

    Attributes:
        kinds: which gauges (``norm-gain``), or single ones (``norm-gain@encoder.layer.0.norm1``);
            those that the model lacks are left out.
    """

    card: ClassVar[Card] = Card(
        summary="Moves the weights by a random element of the whole gauge group",
        fidelity="ours",
        exact=True,
        locks=True,
        architectures="any; each has the gauges that its norms, biases and heads leave",
        notes="all gauges of METHODS section 1 at once; the seed is the key",
    )

    kinds: tuple[str, ...] = _KINDS

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name.partition("@")[0] not in _KINDS:
                raise ValueError(f"unknown gauge {name!r}; there are {', '.join(_KINDS)}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State.

        Raises:
            MethodError: the model has none of the gauges.
        """
        group = self._group(victim.anatomy, victim.expert)
        return group.apply(victim.expert, group.draw(rng))

    def unlock(self, released: State, anatomy: Anatomy, rng: torch.Generator) -> State:
        """The expert again, up to rounding. ``rng`` must be in the state it had when locking."""
        group = self._group(anatomy, released)
        return group.undo(released, group.draw(rng))

    def _group(self, anatomy: Anatomy, state: State) -> gauges.Group:
        try:
            group = gauges.of(anatomy, state).subset(self.kinds)
        except UsageError as error:  # a single gauge of another model
            raise MethodError(str(error)) from error
        if not group.gauges:
            raise MethodError(f"{anatomy.family} has none of the gauges {', '.join(self.kinds)}")
        return group
