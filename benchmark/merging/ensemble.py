"""The output ensemble: no merge at all, every member runs and their logits are averaged.

    logits(x) = Σ c_i · logits_i(x) / Σ c_i

With one head per task, averaging logits is averaging features. It costs as many forward passes as
it has members: a reference for what merging could reach, on the task-aware track.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import ForeignState, State
from benchmark.merging.tau import GridMerger, active


@dataclass(frozen=True)
class OutputEnsemble(GridMerger):
    """Weighted mean of the members' logits."""

    card: ClassVar[Card] = Card(
        summary="Runs every member and averages their logits",
        fidelity="ours",
        role="reference",
        notes="as many forward passes as members; only ratios of coefficients matter",
    )
    task_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per == "layer":
            raise ValueError("an ensemble of outputs has no layers to tell apart: not per=layer")

    def search_space(self, members: int) -> list[Setting]:
        """As for every merger of its kind, once per ratio of coefficients."""
        ratios: dict[tuple[float, ...], Setting] = {}
        for setting in super().search_space(members):
            total = sum(setting.coefficients)
            if total > 0:
                ratio = tuple(round(c / total, 6) for c in setting.coefficients)
                ratios.setdefault(ratio, setting)
        return list(ratios.values())

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        if knowledge is None:
            raise MethodError("the output ensemble runs every member: it needs to know how")
        run = knowledge.forward

        def merged(setting: Setting) -> State:
            members = active(setting, len(experts))
            total = sum(c for _, c in members)

            def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
                # The State holds the members side by side.
                return torch.stack(
                    [
                        c / total * run({key: state[f"{i}.{key}"] for key in base}, inputs)
                        for i, c in members
                    ]
                ).sum(0)

            tensors = {f"{i}.{key}": experts[i][key] for i, _ in members for key in base}
            return ForeignState(tensors, forward)

        return merged
