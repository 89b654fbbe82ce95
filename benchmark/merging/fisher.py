"""Fisher merging: a mean weighted by how sharply each expert's answers depend on each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Access, Card, Knowledge, Setting
from benchmark.core.state import State, norm, task_vector
from benchmark.merging.informed import informed
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import PreparedMerger, active, check_grid, searched


@dataclass(frozen=True)
class Fisher(PreparedMerger):
    """With p = softmax of the expert's own logits on ``per_task`` unlabelled inputs of its task:

        F_i = mean over x of Σ_y p(y|x)·(∂ log p(y|x) / ∂θ_i)²
        θ = Σ c_i·F̂_i·θ_i / Σ c_i·F̂_i,      F̂_i = max(F_i / ‖F_i‖, floor)

    elementwise, one gradient per example and class. The floor makes θ the mean (weighted by c)
    where no expert's answers depend on a parameter.

    Attributes:
        labels: ``expected`` sums over all classes, where there are at most ``most``; ``sampled``
            draws one label per example from p, as many times cheaper as there are classes. Over a
            vocabulary labels are drawn, and they are the first words of answers: unlabelled inputs
            end there.
        shares: the victim's coefficients c that are tried; the partners share the rest equally.
    """

    card: ClassVar[Card] = Card(
        summary="Mean of the weights, weighted by each expert's diagonal Fisher information",
        paper="Merging Models with Fisher-Weighted Averaging",
        authors="Michael Matena, Colin Raffel",
        arxiv="2111.09832",
        fidelity="faithful",
        notes="Fishers of unit norm and floor 1e-6 as in the official code, which lets its target "
        "model win under the floor where ours takes the mean; the grid of coefficients is ours "
        "(theirs has 51 for two models)",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 64
    labels: Literal["expected", "sampled"] = "expected"
    most: int = 1000
    normalize: bool = True
    floor: float = 1e-6
    shares: tuple[float, ...] = searched((0.2, 0.35, 0.5, 0.65, 0.8))

    def __post_init__(self) -> None:
        check_grid(self.shares)
        if min(self.per_task, self.most) < 1 or not self.floor > 0:
            raise ValueError("need per_task and most >= 1, and floor > 0")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"shares must be within 0 and 1, not {self.shares}")

    def search_space(self, members: int) -> list[Setting]:
        """Each share of the victim, equal coefficients; with several partners also these alone."""
        if members == 1:
            return [Setting((1.0,))]
        tried = sorted({*self.shares, 1 / members, *([0.0] if members > 2 else [])})
        rest = members - 1
        return [Setting((share, *((1 - share) / rest,) * rest)) for share in tried]

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """Takes every expert's Fisher.

        Raises:
            MethodError: there is no data, or not of one task for each expert.
        """
        known = informed(knowledge, experts)
        inputs = known.unlabeled(self.per_task, rng)
        keys = moved([task_vector(expert, base) for expert in experts])
        drawn = 0 if self.labels == "sampled" else self.most
        fishers = [
            self._weights(fisher(known, expert, task, inputs[task], keys, drawn, rng))
            for task, expert in zip(known.tasks(), experts, strict=True)
        ]

        def merged(setting: Setting) -> State:
            members = active(setting, len(experts))
            out = dict(base)
            for key in keys if members else ():
                above = torch.zeros_like(wide(base[key]))
                below = torch.zeros_like(above)
                for i, coefficient in members:
                    weight = coefficient * fishers[i][key]
                    # Centred at the base: what did not move comes out as it was.
                    above += weight * (wide(experts[i][key]) - wide(base[key]))
                    below += weight
                out[key] = (wide(base[key]) + above / below).to(base[key].dtype)
            return out

        return merged

    def _weights(self, found: State) -> State:
        size = norm(found) if self.normalize else 1.0
        return {key: (value / (size or 1.0)).clamp(min=self.floor) for key, value in found.items()}


def fisher(
    knowledge: Knowledge,
    state: State,
    task: str,
    inputs: Mapping[str, Tensor],
    keys: Sequence[str],
    most: int,
    rng: torch.Generator,
) -> State:
    """The diagonal Fisher of ``state`` on ``inputs``, for the tensors ``keys``.

    A sum over the classes, where there are at most ``most``; else one is drawn per example.

    One example at a time: the square of a batch's mean gradient is another quantity. (A forward
    pass that sorts its inputs, as that of `minilm`, cannot be vectorised by ``torch.func.vmap``.)
    """
    if not keys:
        return {}
    held = {key: state[key].detach().clone().requires_grad_() for key in keys}
    total = {key: torch.zeros_like(wide(value)) for key, value in held.items()}
    n = len(next(iter(inputs.values())))
    backward = 0
    for row in range(n):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        with torch.enable_grad():
            log_p = knowledge.logits({**state, **held}, task, one)[0].float().log_softmax(-1)
        chances = log_p.detach().exp()
        if len(chances) > most:
            drawn = int(torch.multinomial(chances.cpu(), 1, generator=rng))
            weighted = [(drawn, 1.0)]
        else:
            weighted = list(enumerate(chances.tolist()))
        for label, chance in weighted:
            last = label == weighted[-1][0]
            gradients = torch.autograd.grad(
                log_p[label], list(held.values()), retain_graph=not last, allow_unused=True
            )
            for key, gradient in zip(keys, gradients, strict=True):
                if gradient is not None:
                    total[key].addcmul_(wide(gradient), wide(gradient), value=chance / n)
        backward += len(weighted)
    knowledge.charge(0, backward)
    return total
