"""PaRaMS-D: PaRaMS after dropout-based pruning (arXiv 2503.07661), against adaptive attacks.

The paper names the pruning but does not publish it. Two reconstructions, each applied to the expert
before the rearrangement and scaling of PaRaMS (:mod:`defenses.rearrangement`):

* ``dare`` (arXiv 2311.03099): θ = θ0 + m ⊙ τ / (1 − p), m ~ Bernoulli(1 − p) per entry of
  τ = θ − θ0, so that E[θ] is the expert;
* ``wanda`` (arXiv 2306.11695): per output row i of every attention and MLP Linear, the
  ⌊share · d⌋ entries with the least |W_ij|·‖x_j‖₂ become 0, without rescaling. ‖x_j‖ is taken over
  all tokens of the first ``examples`` training examples, on the unpruned expert.

Either changes the function a little: the release is approximate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Linear, taps
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State, task_vector
from defenses.rearrangement import Rearrangement


@dataclass(frozen=True)
class PaRaMSD(Rearrangement, Defense):
    """Prune, then permute and scale as PaRaMS does.

    Attributes: those of :class:`defenses.rearrangement.Rearrangement`, and
        variant: how to prune.
        drop: ``dare``: the probability p that an entry of τ is dropped.
        share: ``wanda``: the share of each output row that becomes zero.
        examples: ``wanda``: how many training examples calibrate.
    """

    variant: Literal["dare", "wanda"] = "dare"
    drop: float = 0.1
    share: float = 0.2
    examples: int = 32

    card: ClassVar[Card] = Card(
        summary="Prunes the expert, permutes MLP units away from the base and scales heads",
        paper="Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy",
        authors="Wei Junhao, Yu Zhe, Sakuma Jun",
        arxiv="2503.07661",
        fidelity="reconstruction",
        locks=True,
        architectures="any; on rotary models and with QK-norm only that part of A which keeps Q·K; "
        "wanda leaves out Linears whose inputs cannot be watched (open_clip's attn.out_proj)",
        notes="the paper does not publish its pruning: dare (p is ours) and wanda (20 % per row) "
        "are two guesses",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.drop < 1 and 0 <= self.share < 1):
            raise ValueError(f"need drop and share in [0, 1), got {self.drop} and {self.share}")
        if self.examples < 1:
            raise ValueError(f"need examples >= 1, got {self.examples}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State."""
        pruned = self._dare(victim, rng) if self.variant == "dare" else self._wanda(victim)
        return self.rearranged(replace(victim, expert=pruned), rng)

    def _dare(self, victim: Victim, rng: torch.Generator) -> State:
        state = dict(victim.expert)
        for key, tau in task_vector(victim.expert, victim.base).items():
            # Drawn on the CPU: the same seed drops the same entries on every device.
            kept = torch.rand(tau.shape, generator=rng).to(tau.device) >= self.drop
            base = victim.base[key].double()
            exact = victim.expert[key].double() - base
            state[key] = (base + exact * kept / (1 - self.drop)).to(tau.dtype)
        return state

    def _wanda(self, victim: Victim) -> State:
        state = dict(victim.expert)
        linears = [
            linear
            for linear in _linears(victim)
            if taps.watchable(victim.module, linear.weight.key)
        ]
        squares: dict[str, Tensor] = {}

        def see(key: str, inputs: Tensor) -> None:
            sums = inputs.float().square().sum(0).double()
            squares[key] = squares[key] + sums if key in squares else sums

        keys = [linear.weight.key for linear in linears]
        with taps.watch(victim.module, keys, see), torch.no_grad():
            victim.features(victim.expert, victim.task.train[: self.examples].given)
        for linear in linears:
            weight = linear.weight.read(state)
            score = weight.float().abs() * squares[linear.weight.key].sqrt().float()
            least = score.topk(int(self.share * weight.shape[1]), dim=1, largest=False).indices
            linear.weight.write(state, weight.scatter(1, least, 0.0))
        return state


def _linears(victim: Victim) -> list[Linear]:
    """Every Linear of every block, in order."""
    attention = [linear for b in victim.anatomy.attention for linear in b.linears().values()]
    mlp = [linear for b in victim.anatomy.mlp for linear in (b.up, b.gate, b.down) if linear]
    return attention + mlp
