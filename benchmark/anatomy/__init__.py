"""Where an architecture keeps its blocks and channels; which transforms keep its function."""

from benchmark.anatomy.blocks import (
    Anatomy,
    AttentionBlock,
    Axis,
    Channels,
    Linear,
    MLPBlock,
    Slot,
)
from benchmark.anatomy.gauge import apply_qk, apply_vo, permute_heads, permute_units, within

__all__ = [
    "Anatomy",
    "AttentionBlock",
    "Axis",
    "Channels",
    "Linear",
    "MLPBlock",
    "Slot",
    "apply_qk",
    "apply_vo",
    "permute_heads",
    "permute_units",
    "within",
]
