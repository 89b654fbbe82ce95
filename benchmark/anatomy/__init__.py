"""Where an architecture keeps its blocks and channels; which transforms keep its function."""

from benchmark.anatomy.blocks import (
    AttentionBlock,
    Axis,
    Channels,
    Linear,
    MLPBlock,
    Slot,
)
from benchmark.anatomy.gauge import apply_qk, apply_vo, permute_heads, permute_units, within
from benchmark.anatomy.whole import Anatomy

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
