"""Layer refit: rebuild every MLP from the base, to do what the released one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import MLPBlock, Slot, taps
from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Attack, Card, Knowledge
from benchmark.core.errors import MethodError
from benchmark.core.state import State


@dataclass(frozen=True)
class LayerRefit(Attack):
    """With x and h the inputs of ``up`` and ``down`` in the model that users run:

        min_{W1,b1,W2} ‖W2·σ(W1·x + b1) − W2*·h‖² / ‖W2*·h‖²,   started at the base

    by ``steps`` of Adam on ``rows`` rows of unlabelled data. What is fitted is what the block
    *does*, so neither a permutation nor a foreign activation shows, and starting at the base keeps
    it in the base's coordinates. Attention needs no data: it is aligned with the base, exactly.
    """

    card: ClassVar[Card] = Card(
        summary="refit each MLP, initialised at the base, to the released one's outputs",
        fidelity="ours",
        notes="approximate; answers foreign modules (mergebarrier-taylor), which no alignment can",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 64
    rows: int = 512
    steps: int = 60
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.per_task, self.rows, self.steps) < 1 or not self.rate > 0:
            raise ValueError("per_task, rows and steps must be at least 1, rate > 0")

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        base, anatomy = knowledge.base, knowledge.anatomy
        used = knowledge.shipped or released
        if any(mlp.norm for mlp in anatomy.mlp):
            raise MethodError("layer-refit fits MLPs without a norm over their hidden units")
        state = align(released, base, anatomy)
        keys = [lin.weight.key for mlp in anatomy.mlp for lin in (mlp.up, mlp.down)]
        inputs = knowledge.unlabeled(self.per_task, rng, victim_only=True)
        with torch.no_grad(), taps.record(knowledge.module, keys) as seen:
            for batch in inputs.values():
                knowledge.features(used, batch)
        for mlp in anatomy.mlp:
            x, hidden = seen[mlp.up.weight.key], seen[mlp.down.weight.key]
            rows = torch.randperm(len(x), generator=rng)[: self.rows].to(x.device)
            target = hidden[rows] @ mlp.down.weight.read(used).T
            weights = sum(slot.read(base).numel() for slot in (*mlp.rows(), mlp.down.weight))
            knowledge.budget.steps += self.steps
            # Two per weight and row forward, and twice that backward.
            knowledge.budget.flops += 6.0 * self.steps * len(rows) * weights
            for slot, value in self._refit(base, mlp, x[rows], target).items():
                slot.write(state, value)
            if mlp.down.bias is not None:
                mlp.down.bias.write(state, mlp.down.bias.read(used))
        return state

    def _refit(self, base: State, mlp: MLPBlock, x: Tensor, target: Tensor) -> dict[Slot, Tensor]:
        from transformers.activations import ACT2FN

        act = ACT2FN[mlp.activation]
        slots = [*mlp.rows(), mlp.down.weight]
        held = {slot: slot.read(base).detach().clone().requires_grad_() for slot in slots}

        def through(weight: Slot, bias: Slot | None) -> Tensor:
            out = x @ held[weight].T
            return out if bias is None else out + held[bias]

        optimizer = torch.optim.Adam(held.values(), lr=self.rate)
        size = target.square().mean()
        with torch.enable_grad():
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.rate * (1 - step / self.steps)
                hidden = through(mlp.up.weight, mlp.up.bias)
                if mlp.gate is None:
                    hidden = act(hidden)
                else:
                    hidden = hidden * act(through(mlp.gate.weight, mlp.gate.bias))
                loss = (hidden @ held[mlp.down.weight].T - target).square().mean() / size
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return {slot: value.detach() for slot, value in held.items()}
