"""Testbeds that a user declares in a TOML file; and the pieces they are made of.

:func:`open_backbone`: a checkpoint folder or a pinned hub repository as unit features, or as a
language model that answers (:class:`LanguageBackbone`).
:func:`label_names`, :func:`linear_probe`: frozen heads. :class:`Declared`: the testbed.
"""

from benchmark.testbeds.declared.backbones import Backbone, ImageBackbone, TextBackbone
from benchmark.testbeds.declared.heads import label_names, linear_probe
from benchmark.testbeds.declared.language import LanguageBackbone
from benchmark.testbeds.declared.opening import Input, open_backbone, read
from benchmark.testbeds.declared.pixels import Pixels
from benchmark.testbeds.declared.places import Place, folder, place
from benchmark.testbeds.declared.schema import is_testbed
from benchmark.testbeds.declared.testbed import Declared

__all__ = [
    "Backbone",
    "Declared",
    "ImageBackbone",
    "Input",
    "LanguageBackbone",
    "Pixels",
    "Place",
    "TextBackbone",
    "folder",
    "is_testbed",
    "label_names",
    "linear_probe",
    "open_backbone",
    "place",
    "read",
]
