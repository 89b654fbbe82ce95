"""EMR-Merging: elect, mask, rescale (arXiv 2405.17461). Task identity at inference.

    γ = sign Σ τ_i,   τ_uni = γ ⊙ max_{i: τ_i ⊙ γ > 0} |τ_i|              one vector for all
    M_i = [τ_i ⊙ γ > 0],   λ_i = Σ|τ_i| / Σ|M_i ⊙ τ_uni|                   a mask and a number each
    θ_i = θ0 + λ_i · M_i ⊙ τ_uni                                          what serves task i

No coefficients: a member is in or out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import PerTask, State, task_vector
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import UnweightedMerger, active, weighted_sum


@dataclass(frozen=True)
class EMR(UnweightedMerger):
    """One elected task vector, and a mask and a scale per task."""

    card: ClassVar[Card] = Card(
        summary="One elected task vector, masked and rescaled for the task at hand",
        paper="EMR-Merging: Tuning-Free High-Performance Model Merging",
        authors="Chenyu Huang, Peng Ye, Tao Chen, Tong He, Xiangyu Yue, Wanli Ouyang",
        arxiv="2405.17461",
        fidelity="faithful",
        notes="a task without a member is served by θ0 + τ_uni, on which the paper is silent",
    )
    task_aware: ClassVar[bool] = True

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        if knowledge is None:
            raise MethodError("EMR serves every task by another model: it needs to know the tasks")
        tasks = knowledge.tasks()
        taus = [task_vector(expert, base) for expert in experts]

        def merged(setting: Setting) -> State:
            used = [i for i, _ in active(setting, len(taus))]
            uni = elected([taus[i] for i in used])
            served = {tasks[i]: weighted_sum(base, [(1.0, own(taus[i], uni))]) for i in used}
            return PerTask(weighted_sum(base, [(1.0, uni)]), served)

        return merged


def elected(taus: Sequence[State]) -> State:
    """τ_uni of some task vectors (which leave out what did not move)."""
    uni: State = {}
    for key in moved(taus):
        deltas = [wide(tau[key]) for tau in taus if key in tau]
        sign = torch.stack(deltas).sum(0).sign()
        agreeing = torch.stack([(delta * sign).clamp(min=0) for delta in deltas])
        uni[key] = sign * agreeing.amax(0)
    return uni


def own(tau: State, uni: State) -> State:
    """λ_i · M_i ⊙ τ_uni of one task."""
    kept = {
        key: torch.where(wide(delta) * uni[key] > 0, uni[key], 0.0) for key, delta in tau.items()
    }
    whole = sum(float(delta.abs().sum(dtype=torch.float64)) for delta in tau.values())
    left = sum(float(value.abs().sum(dtype=torch.float64)) for value in kept.values())
    scale = whole / left if left else 0.0
    return {key: scale * value for key, value in kept.items()}
