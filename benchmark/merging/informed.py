"""What mergers with data share: their knowledge, and coefficients learned for those who merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from benchmark.api.contracts import Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import State, task_vector
from benchmark.merging.streaming import moved, wide
from benchmark.merging.tau import UnweightedMerger, active

#: Input name → (n, ...).
Inputs = Mapping[str, Tensor]

#: What a merger holds of one task: its inputs, or a Split with labels.
Held = TypeVar("Held")


def informed(knowledge: Knowledge | None, experts: Sequence[State]) -> Knowledge:
    """``knowledge``, if it names one task for each expert.

    Raises:
        MethodError: it does not, or there is none.
    """
    if knowledge is None:
        raise MethodError(
            "this merger needs data of every member's task: merge on a testbed "
            "(unmergebench run), or choose one that needs weights alone (average, ties, ...)"
        )
    if len(knowledge.tasks()) != len(experts):
        raise MethodError(
            f"{len(experts)} models to merge but data of {len(knowledge.tasks())} tasks: "
            "give one task for each model"
        )
    return knowledge


def combined(base: Tensor, deltas: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """θ0 + Σ λ·τ for (λ, τ) pairs, differentiable in every λ; in the dtype of θ0."""
    total = wide(base)
    for coefficient, delta in deltas:
        total = total + coefficient * wide(delta)
    return total.to(base.dtype)


def mixture(base: State, taus: Sequence[State], shares: Tensor) -> State:
    """θ0 + Σ shares_i·τ_i, differentiable in all of them; what no τ holds is shared with θ0."""
    pairs = list(zip(shares, taus, strict=True))
    return {
        **base,
        **{
            k: combined(base[k], [(c, tau[k]) for c, tau in pairs if k in tau]) for k in moved(taus)
        },
    }


class Learner(UnweightedMerger, Generic[Held]):
    """A merger that finds its coefficients by itself, from data drawn once.

    The free-rider chooses only who takes part: a coefficient of 0 leaves a member out, and any
    other means the same as 1. What is learned is kept for each choice of members.
    """

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """Draws the data; a setting learns from that of the members which take part.

        Raises:
            MethodError: there is no data, or not of one task for each expert.
        """
        known = informed(knowledge, experts)
        names = known.tasks()
        examples = self.draw(known, rng)
        start = rng.get_state()
        made: dict[tuple[int, ...], State] = {}

        def merged(setting: Setting) -> State:
            chosen = tuple(i for i, _ in active(setting, len(experts)))
            if chosen not in made:
                members = [experts[i] for i in chosen]
                taus = [task_vector(expert, base) for expert in members]
                held = {names[i]: examples[names[i]] for i in chosen}
                draws = torch.Generator().set_state(start)
                # Without a τ there is nothing to weigh.
                made[chosen] = (
                    self.learn(base, members, taus, held, known, draws)
                    if moved(taus)
                    else dict(base)
                )
            return dict(made[chosen])

        return merged

    @abstractmethod
    def draw(self, knowledge: Knowledge, rng: torch.Generator) -> Mapping[str, Held]:
        """Examples of every task, by its name."""

    @abstractmethod
    def learn(
        self,
        base: State,
        experts: Sequence[State],
        taus: Sequence[State],
        examples: Mapping[str, Held],
        knowledge: Knowledge,
        rng: torch.Generator,
    ) -> State:
        """The merged State. ``experts``, ``taus`` and ``examples`` are in the same order."""
