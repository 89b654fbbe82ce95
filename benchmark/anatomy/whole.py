"""The anatomy of one model: its blocks and channels, read from the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmark.anatomy.blocks import AttentionBlock, Channels, Gauge, MLPBlock
from benchmark.anatomy.families.find import find
from benchmark.core.errors import MethodError

_FREEDOM: tuple[Gauge, ...] = ("sign", "rotary", "general")


@dataclass(frozen=True)
class Anatomy:
    """Where the blocks of one model are. ``family`` is the table row it was read from."""

    family: str
    attention: tuple[AttentionBlock, ...]
    mlp: tuple[MLPBlock, ...]
    channels: tuple[Channels, ...] = ()

    @property
    def units(self) -> tuple[MLPBlock | Channels, ...]:
        """Everything whose units can be renamed: hidden units of MLPs, then channels."""
        return (*self.mlp, *self.channels)

    def attended(self, method: str) -> tuple[AttentionBlock, ...]:
        """The attention blocks, for a method that is nothing without them.

        Raises:
            MethodError: the model has none.
        """
        if not self.attention:
            raise MethodError(
                f"{method} acts on attention, and {self.family} has none; "
                "use a defense of another kind (params permutes channels, trap2 trains)"
            )
        return self.attention

    @property
    def qk_gauge(self) -> Gauge:
        """The Q/K gauge group that every attention block allows."""
        found = [block.qk_gauge for block in self.attention]
        return min(found, key=_FREEDOM.index, default="general")

    @staticmethod
    def of(model: torch.nn.Module) -> Anatomy:
        """The anatomy of a loaded model (transformers or open_clip).

        Raises:
            UsageError: no row of :mod:`benchmark.anatomy.families` fits the model's names.
        """
        return Anatomy(*find(model))
