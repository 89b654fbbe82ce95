"""The gauge group of every family (METHODS section 1): locks draw from it, attacks undo it.

group = gauges.of(anatomy, state)
elements = group.draw(rng)
released = group.apply(expert, elements)      # the same function, in other weights
group.undo(released, elements)                # the expert
group.align(released, base)                   # near the expert, from weights alone
"""

from benchmark.anatomy.gauges.base import Abelian, Element, Gauge
from benchmark.anatomy.gauges.group import BLOCKS, KINDS, Group, align, of

__all__ = ["BLOCKS", "KINDS", "Abelian", "Element", "Gauge", "Group", "align", "of"]
