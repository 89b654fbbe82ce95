"""PaRaMS: parameter rearrangement and random multi-head scaling (arXiv 2503.07661, ICCV 2025).

Post-hoc, without data. The formulas of both operations: :mod:`defenses.rearrangement`, which
`params-d` shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.state import State
from defenses.rearrangement import Rearrangement


@dataclass(frozen=True)
class PaRaMS(Rearrangement, Defense):
    """Permute hidden units away from the base, scale heads.

    Attributes: those of :class:`defenses.rearrangement.Rearrangement`.
    """

    card: ClassVar[Card] = Card(
        summary="Permutes MLP units away from the base and scales attention heads",
        paper="Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy",
        authors="Wei Junhao, Yu Zhe, Sakuma Jun",
        arxiv="2503.07661",
        fidelity="faithful",
        exact=True,
        locks=True,
        architectures="any; on rotary models and with QK-norm only that part of A which keeps Q·K",
        notes="tied=true, scaling=nonsymmetric is what the official code runs today",
    )

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State."""
        return self.rearranged(victim, rng)
