"""Images of any size → what an image model takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmark.core.errors import UsageError

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Pixels:
    """Input size and normalisation.

    ``side``: the shorter edge is resized to it (bicubic), the middle square kept. ``mean`` and
    ``std``: per channel, of values within 0..1.
    """

    side: int = 224
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)

    def prepare(self, images: Sequence[Any]) -> Tensor:
        """PIL images → (n, 3, side, side) uint8, a quarter of the memory of floats."""
        out = torch.empty(len(images), 3, self.side, self.side, dtype=torch.uint8)
        for row, image in enumerate(images):
            out[row] = self._one(image)
        return out

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 → (value / 255 − mean) / std; float images are taken as normalised."""
        if images.dtype != torch.uint8:
            return images
        mean, std = _on(self.mean, images.device), _on(self.std, images.device)
        return (images.float() / 255 - mean) / std

    def _one(self, image: Any) -> Tensor:
        from PIL import Image

        if not isinstance(image, Image.Image):
            raise UsageError(f"the image column holds {type(image).__name__}, not images")
        import numpy as np

        image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        size = round(width * self.side / short), round(height * self.side / short)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.lru_cache(maxsize=64)
def _on(values: Channels, device: torch.device) -> Tensor:
    """(3, 1, 1), sent to the device once: a copy per batch would make the host wait."""
    return torch.tensor(values, device=device)[:, None, None]
