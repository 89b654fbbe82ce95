"""MergeGuard: flatten the loss around the weights, then reset what matters least to a merge
(arXiv 2511.11851, CVPR 2026; not the two other works of that name). Training-time::

    stage 1    J(θ) = CE(θ) + α · Σ_l ‖θ^(l)‖²     over the tensors that are trained; θ' = argmin
    stage 2    θ* = θ' − β · M ⊙ (θ' − θ0)         no training

M = 0 on the k' most critical layers (a layer, here a module, is critical by the validation accuracy
that θ' loses when the layer's τ is set to zero) and on the least important parameters of the other
layers, a share 1 − k of them: of all parameters (1 − k)(1 − k') if layers are of one size. So β = 1
*resets* a share of k(1 − k') = 9 % to the base, and β = 2 negates their τ.

Published: α = 0.01, k = k' = 0.1, β = 1. They are the default, and may well break the standalone
model (the utility gate says so). ``tune=true`` scales α, then β, down until validation loses no
more than ``tolerance``, and reports the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.api.recipe import Batch
from benchmark.core.state import State, add, task_vector

_EXAMPLES = 256  # of the training split, for the gradient
_BATCH = 64
#: Factors on a constant that the search tries, in turn.
_ALPHA_FACTORS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
_BETA_FACTORS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


@dataclass(frozen=True)
class MergeGuard(Defense):
    """Weight-norm fine-tuning, then masked resetting.

    Attributes:
        stages: ``both``; ``first``: θ' is released; ``second``: θ' is the expert.
        alpha: α, on the raw weights.
        beta: β.
        fraction: k, the share of parameters outside critical layers with M = 1.
        critical: k', the share of layers with M = 0 throughout.
        importance: |τ|·|∂CE/∂θ|, |τ| or |θ|, at θ'.
        tune: scale α and β down to the tolerance.
        tolerance: the standalone drop against the expert that tuning accepts (share of right
            answers).
    """

    stages: Literal["both", "first", "second"] = "both"
    alpha: float = 0.01
    beta: float = 1.0
    fraction: float = 0.1
    critical: float = 0.1
    importance: Literal["tau-grad", "tau", "theta"] = "tau-grad"
    tune: bool = False
    tolerance: float = 0.015

    card: ClassVar[Card] = Card(
        summary="Weight-norm fine-tuning, then part of the task vector is reset to the base",
        paper="MergeGuard",
        arxiv="2511.11851",
        fidelity="reconstruction",
        trains=True,
        architectures="any; full fine-tunes",
        notes="the importance measure, stage 1's schedule and the values of k, k' and β per model "
        "are not published: |τ|·|grad|, the testbed's recipe, one set of constants; the paper "
        "exempts embeddings, norms and lm_head of LLMs, here only what the recipe freezes",
    )

    def __post_init__(self) -> None:
        for name in ("fraction", "critical"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"need {name} within [0, 1], got {getattr(self, name)}")
        for name in ("alpha", "beta", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"need {name} >= 0, got {getattr(self, name)}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State."""
        begin = rng.get_state()

        def flattened(alpha: float) -> State:
            rng.set_state(begin)  # every α sees the same batches
            loss = WeightNormLoss(alpha)
            return victim.train(victim.base, rng, loss=loss)

        state = victim.expert
        if self.stages != "second":
            state = self._choose(victim, "alpha", self.alpha, _ALPHA_FACTORS, flattened)
        if self.stages == "first":
            return state
        trained, direction = state, self.direction(victim, state, rng)
        return self._choose(
            victim, "beta", self.beta, _BETA_FACTORS, lambda b: add(trained, direction, -b)
        )

    def direction(self, victim: Victim, state: State, rng: torch.Generator) -> State:
        """M ⊙ (θ' − θ0), without the tensors where it is zero."""
        tau = task_vector(state, victim.base)
        guarded = self._critical(victim, state, tau)
        victim.note("mergeguard.critical", guarded)
        free = {key: delta for key, delta in tau.items() if layer(key) not in guarded}
        weights = self._importance(victim, state, free, rng)
        chosen = top_share(weights, self.fraction)
        return {key: delta * chosen[key] for key, delta in free.items() if chosen[key].any()}

    def _critical(self, victim: Victim, state: State, tau: State) -> list[str]:
        """The layers that validation misses most (ties: the one with the larger τ)."""
        layers: dict[str, list[str]] = {}
        for key in tau:
            layers.setdefault(layer(key), []).append(key)
        count = round(self.critical * len(layers))
        if not count:
            return []
        reached = {}
        for name, keys in layers.items():
            masked = {**state, **{key: victim.base[key] for key in keys}}
            size = sum(float(tau[key].double().square().sum()) for key in keys)
            reached[name] = victim.accuracy(masked, victim.task.validation), -size
        return sorted(reached, key=reached.__getitem__)[:count]

    def _importance(
        self, victim: Victim, state: State, tau: State, rng: torch.Generator
    ) -> dict[str, Tensor]:
        if self.importance == "theta":
            return {key: state[key].abs() for key in tau}
        if self.importance == "tau":
            return {key: delta.abs() for key, delta in tau.items()}
        gradient = _gradient(victim, state, list(tau), rng)
        return {key: delta.abs() * gradient[key].abs() for key, delta in tau.items()}

    def _choose(
        self,
        victim: Victim,
        name: str,
        value: float,
        factors: tuple[float, ...],
        make: Callable[[float], State],
    ) -> State:
        """``make(value)``, or with ``tune`` of the first smaller value within the tolerance.

        If none is, the smallest: the utility gate then shows what the search has recorded.
        """
        if not self.tune or not value:
            return make(value)
        validation = victim.task.validation
        expert = victim.accuracy(victim.expert, validation)
        tried = []
        for factor in factors:
            state = make(factor * value)
            reached = victim.accuracy(state, validation)
            drop = round(expert - reached, 6)
            tried.append({name: factor * value, "validation": reached, "drop": drop})
            if drop <= self.tolerance:
                break
        victim.note(f"mergeguard.search.{name}", tried)
        victim.note(f"mergeguard.{name}", tried[-1][name])
        return state


@dataclass(frozen=True)
class WeightNormLoss:
    """J of stage 1, for one batch."""

    alpha: float

    def __call__(self, batch: Batch, state: State, rng: torch.Generator) -> Tensor:
        trained = (value for value in state.values() if value.requires_grad)
        size = torch.stack([value.square().sum() for value in trained]).sum()
        return batch.loss(state) + self.alpha * size


def layer(key: str) -> str:
    """The module that a tensor belongs to."""
    return key.rpartition(".")[0] or key


def top_share(weights: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the ``round(share · n)`` largest of all n entries (ties: the first)."""
    if not weights:
        return {}
    flat = torch.cat([value.flatten() for value in weights.values()])
    # A stable sort, for topk may choose among equals as it likes.
    order = flat.argsort(descending=True, stable=True)[: round(share * len(flat))]
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[order] = True
    parts = mask.split([value.numel() for value in weights.values()])
    return {
        key: part.reshape(value.shape)
        for (key, value), part in zip(weights.items(), parts, strict=True)
    }


def _gradient(victim: Victim, state: State, keys: list[str], rng: torch.Generator) -> State:
    """∂L/∂θ at ``state``, L the training loss, over up to 256 training examples."""
    train = victim.task.train
    rows = torch.randperm(len(train), generator=rng)[:_EXAMPLES].to(train.labels.device)
    leaves = {key: state[key].detach().clone().requires_grad_() for key in keys}
    total = {key: torch.zeros_like(value) for key, value in leaves.items()}
    for part in rows.split(_BATCH):
        batch = victim.batch(train[part], rng)
        with torch.enable_grad():
            loss = batch.loss({**state, **leaves}) * len(part)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for key, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                total[key] += gradient
    return total
