"""Endless shuffled batches of one split."""

from __future__ import annotations

import torch

from benchmark.core.data import Split


class Batches:
    """Endless batches, reshuffled every epoch; a split smaller than ``size`` is one batch."""

    def __init__(self, split: Split, size: int, rng: torch.Generator) -> None:
        self._split, self._size, self._rng = split, size, rng
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self._sent = self.order, self.order

    def draw(self) -> Split:
        # The short last batch is dropped: its rows come up again in the next epoch.
        if not len(self.order) or self.position > max(len(self.order) - self._size, 0):
            self.order = torch.randperm(len(self._split), generator=self._rng)
            self.position = 0
        if self._sent[0] is not self.order:
            # One transfer per epoch: with one per batch the host would wait for the device.
            self._sent = self.order, self.order.to(self._split.labels.device)
        rows = self._sent[1][self.position : self.position + self._size]
        self.position += self._size
        return self._split[rows]
