"""The gauge group of every family (METHODS section 1): locks draw from it, attacks undo it.

group = gauges.of(anatomy, state)
elements = group.draw(rng)
released = group.apply(expert, elements)      # the same function, in other weights
group.undo(released, elements)                # the expert
group.align(released, base)                   # near the expert, from weights alone
gauges.moved(group, released, base).amounts   # {"norm-gain": 25.8, …}: which kinds, how far
"""

from benchmark.anatomy.gauges.base import Abelian, Element, Gauge
from benchmark.anatomy.gauges.group import BLOCKS, ENOUGH, KINDS, Group, align, of
from benchmark.anatomy.gauges.moved import Moved, moved

__all__ = [
    "BLOCKS",
    "ENOUGH",
    "KINDS",
    "Abelian",
    "Element",
    "Gauge",
    "Group",
    "Moved",
    "align",
    "moved",
    "of",
]
