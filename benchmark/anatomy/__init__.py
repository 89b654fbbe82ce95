"""Where an architecture keeps its attention and MLP blocks; which transforms keep its function."""

from benchmark.anatomy.blocks import Anatomy, AttentionBlock, Linear, MLPBlock, Slot
from benchmark.anatomy.gauge import apply_qk, apply_vo, permute_heads, permute_units, within

__all__ = [
    "Anatomy",
    "AttentionBlock",
    "Linear",
    "MLPBlock",
    "Slot",
    "apply_qk",
    "apply_vo",
    "permute_heads",
    "permute_units",
    "within",
]
