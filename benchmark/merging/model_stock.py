"""Model Stock: interpolate between base and average by the angle of the task vectors.

Per tensor, cos θ the mean cosine between pairs of τ, N members (arXiv 2403.19522, eq. 7)::

    θ = t·mean(θ_i) + (1 − t)·θ0,     t = N·cos θ / (1 + (N − 1)·cos θ)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import State, task_vector
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import UnweightedMerger, active

#: Where 1 + (N − 1)·cos θ is smaller there is no finite t: the base stays (as in mergekit).
_SINGULAR = 1e-6


@dataclass(frozen=True)
class ModelStock(UnweightedMerger):
    """No coefficient to tune: members are in or out."""

    card: ClassVar[Card] = Card(
        summary="Moves from the base to the average as far as the experts agree",
        paper="Model Stock: All we need is just a few fine-tuned models",
        authors="Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han",
        arxiv="2403.19522",
        fidelity="faithful",
    )

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [task_vector(expert, base) for expert in experts]

        def merged(setting: Setting) -> State:
            chosen = [taus[i] for i, _ in active(setting, len(taus))]
            if len(chosen) < 2:
                raise MethodError("model-stock needs at least two models")
            out = dict(base)
            for key in moved(chosen):
                zero = torch.zeros_like(base[key])
                deltas = torch.stack([wide(tau.get(key, zero)).reshape(-1) for tau in chosen])
                step = _ratio(deltas) * deltas.mean(0)
                out[key] = (wide(base[key]) + step.reshape(base[key].shape)).to(base[key].dtype)
            return out

        return merged


def _ratio(deltas: torch.Tensor) -> float:
    """t from (N, n) task vectors."""
    norms = deltas.norm(dim=1)
    cosines = [
        float((deltas[i] @ deltas[j]) / (norms[i] * norms[j]).clamp(min=1e-6))
        for i, j in itertools.combinations(range(len(deltas)), 2)
    ]
    cosine = sum(max(-1.0, min(1.0, c)) for c in cosines) / len(cosines)
    below = 1 + (len(deltas) - 1) * cosine
    return 0.0 if abs(below) < _SINGULAR else len(deltas) * cosine / below
