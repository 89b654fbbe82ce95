"""Where each family keeps its norms, embeddings and heads: one row of names per wiring.

A row belongs to the families of :mod:`benchmark.anatomy.families` of its names, whose layers say
where the blocks are. Names are relative: of norms and layer scales to the layer, of embeddings and
the last norm to ``root``, the part before the layer's own name without ``inside``.

Nothing in part: a tensor of the tower that neither the row nor a block answers for may read or
write anything, so the gauges outside the blocks are then not offered, and ``Wiring.uncovered`` says
which tensor it was. A head is known by the name that its own class gives it; without one, what the
last norm gives is the model's output, and nothing may change it. Convolutional towers:
:mod:`.convolutional`.
"""

from __future__ import annotations

from benchmark.anatomy.gauges.rows.audio import AUDIO
from benchmark.anatomy.gauges.rows.crossing import CROSSING
from benchmark.anatomy.gauges.rows.decoders import DECODERS
from benchmark.anatomy.gauges.rows.encoders import ENCODERS
from benchmark.anatomy.gauges.rows.row import Row
from benchmark.anatomy.gauges.rows.vision import VISION

ROWS: tuple[Row, ...] = (*ENCODERS, *VISION, *DECODERS, *AUDIO, *CROSSING)

__all__ = ["ROWS", "Row"]
