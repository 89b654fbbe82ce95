"""Where each architecture keeps its blocks: one row of name templates per family.

A row names the tensors of one layer below ``layer`` (``{}`` is the layer's number); whatever
stands before it (``bert.``, ``vision_model.``, ``visual.transformer.``) is read off the model, so
one row covers bare models, models with heads, wrappers, and both towers of CLIP. In the manner of
Git Re-Basin's permutation specs (Ainsworth et al. 2023, arXiv 2209.04836).

To support another architecture, add a row. Names alone prove nothing: ESM uses BERT's names with
rotary embeddings. So a row also lists the attention classes whose gauge group was checked, and
``tests/test_anatomy.py`` must pass on a tiny model of it (``tests/zoo``). Convolutional towers
have rows of their own kind, in :mod:`benchmark.anatomy.convolutional`.
"""

from __future__ import annotations

from benchmark.anatomy.families.audio import AUDIO
from benchmark.anatomy.families.crossing import CROSSING
from benchmark.anatomy.families.decoders import DECODERS
from benchmark.anatomy.families.diffusion import DIFFUSION
from benchmark.anatomy.families.encoders import ENCODERS
from benchmark.anatomy.families.multimodal import MULTIMODAL
from benchmark.anatomy.families.row import Family
from benchmark.anatomy.families.vision import VISION

FAMILIES: tuple[Family, ...] = (
    *ENCODERS,
    *VISION,
    *DECODERS,
    *CROSSING,
    *AUDIO,
    *MULTIMODAL,
    *DIFFUSION,
)

__all__ = ["FAMILIES", "Family"]
