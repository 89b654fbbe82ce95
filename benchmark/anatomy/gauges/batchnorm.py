"""The gauge of a batch norm's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy.gauges.base import Abelian, Element, log_uniform, normal
from benchmark.anatomy.gauges.wiring import BatchNorm, add_to, vector
from benchmark.core.state import State

#: torch's default, which every tower that :mod:`benchmark.anatomy.convolutional` knows uses.
_EPS = 1e-5


@dataclass(frozen=True)
class Statistics(Abelian):
    """Filters × s with μ·s and (σ² + ε)·s², and μ + c with β + γ·c/σ: exact, ε included.

    An element is (s, c) per channel, s first.
    """

    norm: BatchNorm
    channels: int

    kind: ClassVar[str] = "batch-norm"

    def draw(self, rng: torch.Generator) -> Element:
        # s ≥ 1 keeps (σ² + ε)·s² − ε, which is stored, from becoming negative.
        shape = (self.channels,)
        return log_uniform(shape, rng, 1.0, 4.0), normal(shape, rng, 0.5)

    def move(self, state: State, element: Element) -> None:
        s, c = element
        norm = self.norm
        weight = norm.conv.weight.read(state).double()
        norm.conv.weight.write(state, weight * s.reshape(-1, *[1] * (weight.ndim - 1)))
        if norm.conv.bias is not None:
            norm.conv.bias.write(state, vector(norm.conv.bias, state) * s)
        variance = (vector(norm.variance, state) + _EPS) * s.square()
        norm.variance.write(state, variance - _EPS)
        norm.mean.write(state, vector(norm.mean, state) * s + c)
        add_to(norm.bias, state, vector(norm.gain, state) * c / variance.sqrt())

    def inverse(self, element: Element) -> Element:
        s, c = element
        return 1 / s, -c / s

    def standard(self, state: Mapping[str, Tensor]) -> Element:
        s = ((1 + _EPS) / (vector(self.norm.variance, state) + _EPS)).sqrt()
        return s, -vector(self.norm.mean, state) * s

    def nearest(self, state: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Element:
        """The statistics of the anchor, which no fine-tuning moves."""
        own, goal = (vector(self.norm.variance, source) + _EPS for source in (state, anchor))
        s = (goal / own).sqrt()
        return s, vector(self.norm.mean, anchor) - vector(self.norm.mean, state) * s
