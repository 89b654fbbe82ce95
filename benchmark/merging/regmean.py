"""RegMean: every Linear solves a least-squares problem against what the experts' Linears give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, Slot, taps
from benchmark.api.contracts import Access, Card, Knowledge, Setting
from benchmark.core.state import State
from benchmark.merging.informed import Inputs, informed
from benchmark.merging.streaming import differences
from benchmark.merging.tau import (
    PreparedMerger,
    active,
    check_grid,
    in_or_out,
    searched,
    weighted_sum,
)


@dataclass(frozen=True)
class RegMean(PreparedMerger):
    """For every Linear of the attention and MLP blocks, with X_i its inputs in expert i on
    ``per_task`` unlabelled inputs of that expert's task and W (in × out):

        G_i = X_iᵀX_i, off-diagonal entries times α
        W = (Σ G_i)⁻¹ · Σ G_i·W_i

    which for α = 1 minimises Σ ‖X_i·W − X_i·W_i‖². All other tensors (biases, norms, embeddings)
    are averaged. Solved in float64 for the distance from the mean W̄ of the experts,

        W = W̄ + (Σ G_i + ε·I)⁻¹ · Σ G_i·(W_i − W̄)

    with ε = ``ridge`` times the mean of the diagonal. The same W where Σ G_i is invertible; in
    directions that no input enters, W̄. A Linear that did not run, or whose inputs cannot be watched
    (:func:`benchmark.anatomy.taps.watchable`), is averaged.

    Attributes:
        alpha: one α; None: each of ``grid`` is tried.
    """

    card: ClassVar[Card] = Card(
        summary="Every Linear as the least-squares fit to what the experts' Linears give on data",
        paper="Dataless Knowledge Fusion by Merging Weights of Language Models",
        authors="Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
        arxiv="2212.09849",
        fidelity="reconstruction",
        notes="the formula is the paper's; the values of α tried, the ridge and Grams as sums (not "
        "means) over rows are ours; Grams come from data, not from their owners; heads are frozen",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 128
    ridge: float = 1e-9
    alpha: float | None = searched(None)
    grid: tuple[float, ...] = searched((0.1, 0.5, 0.9, 1.0))

    def __post_init__(self) -> None:
        values = (*self.grid, 1.0 if self.alpha is None else self.alpha)
        check_grid(values)
        if not all(0 <= value <= 1 for value in values):
            raise ValueError("alpha must be within 0 and 1")
        if self.per_task < 1 or not self.ridge > 0:
            raise ValueError("need per_task >= 1 and ridge > 0")

    def search_space(self, members: int) -> list[Setting]:
        """Each α, with everybody; with several partners also without the victim."""
        values = self.grid if self.alpha is None else (self.alpha,)
        return [
            Setting(s.coefficients, {"alpha": alpha})
            for s in in_or_out(members)
            for alpha in values
        ]

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        """Takes every expert's Grams. A setting without ``alpha`` gets the largest of the grid
        under 1 (or ``alpha``).

        Raises:
            MethodError: there is no data, or not of one task for each expert.
        """
        known = informed(knowledge, experts)
        inputs = known.unlabeled(self.per_task, rng)
        taus = [differences(expert, base) for expert in experts]
        slots = [
            slot
            for slot in weights(known.anatomy)
            if any(slot.key in tau for tau in taus) and taps.watchable(known.module, slot.key)
        ]
        keys = list(dict.fromkeys(slot.key for slot in slots))
        grams = [
            gram(known, expert, inputs[task], keys)
            for task, expert in zip(known.tasks(), experts, strict=True)
        ]
        below = [value for value in self.grid if value < 1] or list(self.grid)
        default = max(below) if self.alpha is None else self.alpha

        def merged(setting: Setting) -> State:
            members = [i for i, _ in active(setting, len(experts))]
            alpha = float(setting.parameters.get("alpha", default))
            out = weighted_sum(base, [(1 / len(members), taus[i]) for i in members])
            for slot in slots:
                found = [grams[i][slot.key] for i in members if slot.key in grams[i]]
                if len(members) > 1 and len(found) == len(members):
                    seen = [_entering(slot, gram) for gram in found]
                    own = [slot.read(experts[i]) for i in members]
                    slot.write(out, self._solve(own, seen, alpha))
            return out

        return merged

    def _solve(self, own: Sequence[Tensor], grams: Sequence[Tensor], alpha: float) -> Tensor:
        """(out, in) weights and (in, in) Grams → the merged weight, (out, in) float64."""
        mean = torch.stack([weight.double() for weight in own]).mean(0)
        total = torch.zeros_like(grams[0])
        pull = torch.zeros_like(mean)
        for weight, found in zip(own, grams, strict=True):
            shrunk = alpha * found
            shrunk.diagonal().copy_(found.diagonal())
            total += shrunk
            pull += (weight.double() - mean) @ shrunk
        scale = total.diagonal().mean()
        if not scale > 0:
            return mean  # nothing but zeros ever entered
        total.diagonal().add_(self.ridge * scale)
        return mean + torch.linalg.solve(total, pull, left=False)


def _entering(slot: Slot, gram: Tensor) -> Tensor:
    """The part of an owner's Gram that is of the slot's own inputs."""
    return slot.entering(slot.entering(gram).T)


def weights(anatomy: Anatomy) -> Iterator[Slot]:
    """The weight of every Linear in the blocks."""
    for block in anatomy.attention:
        for linear in block.linears().values():
            yield linear.weight
    for mlp in anatomy.mlp:
        for part in (mlp.up, mlp.gate, mlp.down):
            if part is not None:
                yield part.weight


def gram(
    knowledge: Knowledge, state: State, inputs: Inputs, keys: Sequence[str]
) -> dict[str, Tensor]:
    """XᵀX (in, in) float64 of what enters the owner of each key, if it runs."""
    found: dict[str, Tensor] = {}

    def see(key: str, rows: Tensor) -> None:
        wide = rows.double()
        knowledge.budget.flops += 2.0 * wide.numel() * wide.shape[1]
        product = wide.T @ wide
        found[key] = found[key] + product if key in found else product

    with torch.no_grad(), taps.watch(knowledge.module, keys, see):
        knowledge.features(state, inputs)
    return found
