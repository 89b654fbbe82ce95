"""SLERP: spherical interpolation of the weights of two models, as in mergekit.

Per tensor, with Ω the angle between the flattened weights a and b::

    slerp(t; a, b) = sin((1 − t)·Ω)/sin Ω · a + sin(t·Ω)/sin Ω · b

and (1 − t)·a + t·b where |cos Ω| > 0.9995 (which plain fine-tunes of one base nearly always meet).
A setting's coefficients are (1 − t, t), so that 0 leaves a model out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.merging.streaming import wide
from benchmark.merging.tau import PreparedMerger, active, check_grid

_COLINEAR = 0.9995


@dataclass(frozen=True)
class Slerp(PreparedMerger):
    """Interpolate two models.

    Attributes:
        grid: values of t tried; 0 is the victim, 1 the partner.
    """

    grid: tuple[float, ...] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)

    card: ClassVar[Card] = Card(
        summary="Spherical interpolation of two models, tensor by tensor",
        paper="Animating rotation with quaternion curves (the formula); mergekit (its use)",
        authors="Ken Shoemake; Charles Goddard et al.",
        arxiv="2403.13257",
        fidelity="faithful",
    )

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if not all(0 <= t <= 1 for t in self.grid):
            raise ValueError(f"need 0 <= t <= 1 in grid, got {self.grid}")

    def search_space(self, members: int) -> list[Setting]:
        """One setting per t.

        Raises:
            MethodError: for other than two members.
        """
        if members != 2:
            raise MethodError(f"slerp merges exactly two models, not {members}; use another merger")
        return [Setting((1 - t, t)) for t in dict.fromkeys(self.grid)]

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        angles: dict[str, float] = {}

        def merged(setting: Setting) -> State:
            kept = active(setting, len(experts))
            if len(kept) > 2:
                raise MethodError(f"slerp merges exactly two models, not {len(kept)}")
            if any(c < 0 for _, c in kept):
                raise MethodError(f"slerp needs coefficients >= 0, got {setting.coefficients}")
            if not kept:
                return dict(base)
            if len(kept) == 1:
                return _floating(base, lambda key: experts[kept[0][0]][key])
            (i, first), (j, second) = kept
            t = second / (first + second)

            def mix(key: str) -> Tensor:
                a, b = experts[i][key], experts[j][key]
                if a is b or torch.equal(a, b):
                    return a
                if key not in angles:
                    angles[key] = _angle(a, b)
                return _interpolate(t, a, b, angles[key])

            return _floating(base, mix)

        return merged


def _floating(base: State, value: Callable[[str], Tensor]) -> State:
    """Each floating-point tensor from ``value``; integer buffers are the base's."""
    return {key: value(key) if old.is_floating_point() else old for key, old in base.items()}


def _angle(a: Tensor, b: Tensor) -> float:
    """Angle between two flattened tensors; 0 where mergekit falls back to a straight line."""
    # In float64: an error of 1e-7 in a cosine near 1 is one of 1e-6 in the angle.
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    norms = float(x.norm()) * float(y.norm())
    cosine = float(torch.dot(x, y)) / norms if norms > 1e-16 else 0.0
    return 0.0 if abs(cosine) > _COLINEAR else math.acos(cosine)


def _interpolate(t: float, a: Tensor, b: Tensor, angle: float) -> Tensor:
    s0, s1 = 1 - t, t
    if angle:
        s0, s1 = (math.sin(s * angle) / math.sin(angle) for s in (s0, s1))
    return torch.add(wide(b) * s1, wide(a), alpha=s0).to(a.dtype)
