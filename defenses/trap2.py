"""Trap²: fine-tuning that fails as soon as its task vector is scaled (arXiv 2601.21898, ICML 2026).

Training-time, from the base θ0, any architecture. Per step one draw s::

    J(τ) = L(θ0 + τ) − λ · w(s) · L(θ0 + s·τ)
    s ~ U[0.05, 2], redrawn while |s − 1| < 0.05        w(s) = 1/s (vision) or 1/√s (LLMs)

The release is used at s = 1; a merge scales its τ. With LoRA, s scales B, which is the same τ.

λ does not transfer between logit scales, so by default it is searched: upwards through ``grid``
until the model loses more than ``tolerance`` on the validation split; the last one that does not
is released. The owner's whole search is reported (``trap2.search``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.api.recipe import Batch, Lora, Recipe
from benchmark.core.state import State

_LOW, _HIGH, _BAND = 0.05, 2.0, 0.05


@dataclass(frozen=True)
class Trap2(Defense):
    """Train the trap.

    Attributes:
        weight: λ; None: searched on the validation split.
        grid: the values of λ that are tried, rising.
        tolerance: the standalone drop against the expert that the search accepts (share of right
            answers).
        adapter: ``full``: every tensor the recipe trains; ``lora``: the recipe's own adapters, or
            rank 16 on q, k, v, o.
        steps: training steps as a multiple of the testbed's recipe.
        rate: learning rate as a multiple of the recipe's for all tensors; None: 1 for full, 10 for
            lora.
        inverse: w(s): ``linear`` 1/s, ``sqrt`` 1/√s.
        adv_loss_cap: bound on L(θ0 + s·τ), above which it has no gradient; None, as published.
    """

    weight: float | None = None
    grid: tuple[float, ...] = (0.005, 0.015, 0.045, 0.135, 0.405, 1.215)
    tolerance: float = 0.01
    adapter: Literal["full", "lora"] = "full"
    steps: float = 1.0
    rate: float | None = None
    inverse: Literal["linear", "sqrt"] = "linear"
    adv_loss_cap: float | None = None

    card: ClassVar[Card] = Card(
        summary="Fine-tuning that raises the loss wherever the task vector is scaled",
        paper="Trap²",
        arxiv="2601.21898",
        fidelity="faithful",
        trains=True,
        notes="loss, AdamW's constants and cosine decay as published; steps, batch and learning "
        "rate are the testbed's, LoRA has no dropout, and the weight is chosen on validation "
        "instead of stopping early; a run with adv_loss_cap is a variant of ours",
    )

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.grid, self.grid[1:], strict=False))
        if not (self.grid and self.grid[0] > 0 and rising and self.grid[-1] < math.inf):
            raise ValueError(f"need a rising grid of positive weights, got {self.grid}")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise ValueError(f"need weight >= 0, got {self.weight}")
        if not self.tolerance >= 0:
            raise ValueError(f"need tolerance >= 0, got {self.tolerance}")
        for name in ("steps", "rate", "adv_loss_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"need {name} > 0, got {value}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The trained State. Every weight of the search sees the same draws."""
        if self.adv_loss_cap is not None:
            victim.note("trap2.variant", f"adversarial loss capped at {self.adv_loss_cap:g}")
        if self.weight is not None:
            return self._train(victim, self.weight, rng)
        validation = victim.task.validation
        wanted = victim.accuracy(victim.expert, validation) - self.tolerance
        begin = rng.get_state()
        tried: list[dict[str, float | bool]] = []
        best: tuple[float, State, Tensor] | None = None
        for weight in self.grid:
            rng.set_state(begin)
            state = self._train(victim, weight, rng)
            reached = victim.accuracy(state, validation)
            # A count of examples must not fail by a rounding error.
            passed = reached >= wanted - 1e-9
            drop = round(wanted + self.tolerance - reached, 6)
            tried.append({"weight": weight, "validation": reached, "drop": drop, "passed": passed})
            if passed or best is None:
                best = weight, state, rng.get_state()
            if not passed:
                break
        assert best is not None
        weight, state, after = best
        rng.set_state(after)  # parts of a composite draw as they do after this weight alone
        victim.note("trap2.search", tried)
        victim.note("trap2.weight", weight)
        return state

    def recipe(self, victim: Victim) -> Recipe:
        """The testbed's recipe with the paper's optimizer."""
        known = victim.recipe
        lora = (known.lora or Lora()) if self.adapter == "lora" else None
        rate = known.adapted(lora).learning_rate
        if self.rate is not None:
            rate = self.rate * known.adapted(None).learning_rate
        return replace(
            known,
            steps=max(1, round(self.steps * known.steps)),
            learning_rate=rate,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.0,
            schedule="cosine",
            lora=lora,
        )

    def _train(self, victim: Victim, weight: float, rng: torch.Generator) -> State:
        loss = TrapLoss(victim.base, weight, self.inverse, self.adv_loss_cap)
        return victim.train(victim.base, rng, recipe=self.recipe(victim), loss=loss)


@dataclass(frozen=True)
class TrapLoss:
    """J of the module's docstring, for one batch."""

    base: State
    weight: float
    inverse: Literal["linear", "sqrt"] = "linear"
    cap: float | None = None

    def __call__(self, batch: Batch, state: State, rng: torch.Generator) -> Tensor:
        plain = batch.loss(state)
        s = draw_scale(rng)
        trapped = batch.loss(scaled(self.base, state, s))
        if self.cap is not None:
            trapped = trapped.clamp(max=self.cap)
        return plain - self.weight * s ** (-1.0 if self.inverse == "linear" else -0.5) * trapped


def draw_scale(rng: torch.Generator) -> float:
    """s, uniform on [0.05, 2] without the band around 1."""
    while True:
        s = _LOW + (_HIGH - _LOW) * float(torch.rand((), generator=rng, dtype=torch.float64))
        if abs(s - 1) >= _BAND:
            return s


def scaled(base: State, state: State, s: float) -> State:
    """θ0 + s·(θ − θ0), differentiable in θ; tensors that are not trained stay shared."""
    return {
        key: value if value is base[key] else torch.lerp(base[key], value, s)
        for key, value in state.items()
    }
