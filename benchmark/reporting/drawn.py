"""What models of a run drew, side by side: for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from benchmark.core.pictures import unpack
from benchmark.core.records import QUALITIES, Cell

#: Screen pixels of one that was drawn.
_ZOOM = 4


class Drawn(NamedTuple):
    """One victim under one defense and attack: model → its pictures as a data URI."""

    victim: str
    defense: str
    attack: str
    pictures: dict[str, str]


def drawn(cells: Iterable[Cell]) -> list[Drawn]:
    """One line per victim, defense and attack: of its first merger and seed."""
    found: dict[tuple[str, str, str, str], Drawn] = {}
    for cell in cells:
        where = cell.testbed, cell.victim, cell.defense, cell.attack
        if cell.pictures and where not in found:
            strips = {who: strip(cell.pictures[who]) for who in QUALITIES if who in cell.pictures}
            found[where] = Drawn(*where[1:], strips)
    return list(found.values())


def strip(text: str) -> str:
    """Pictures beside each other, as a PNG in a data URI."""
    from PIL import Image

    pictures = unpack(text)
    framed = np.pad(pictures, ((0, 0), (0, 0), (0, 1)), constant_values=128)
    row = np.concatenate(list(framed), axis=1)
    zoomed = row.repeat(_ZOOM, 0).repeat(_ZOOM, 1)
    data = io.BytesIO()
    Image.fromarray(zoomed).save(data, "PNG")
    return data_uri(data.getvalue())


def data_uri(png: bytes) -> str:
    """A PNG for a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
