"""MDM-OC: orthogonalise each task vector against the earlier ones, then add (arXiv 2507.20997).

    τ'_i = τ_i − Σ_{j<i} ⟨τ_i, τ'_j⟩/‖τ'_j‖² · τ'_j          (over the whole flattened model)
    θ = θ0 + Σ c_i · τ'_i

A member is unmerged by subtracting its part, which no other part contains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.state import State, task_vector
from benchmark.merging.tau import GridMerger, active, weighted_sum


@dataclass(frozen=True)
class MDMOC(GridMerger):
    """Gram–Schmidt on whole task vectors; the victim is the first and stays as it is."""

    card: ClassVar[Card] = Card(
        summary="Adds task vectors made orthogonal to each other (Gram–Schmidt)",
        paper="Modular Delta Merging with Orthogonal Constraints",
        arxiv="2507.20997",
        fidelity="reconstruction",
        notes="fixed α searched like any coefficient; the paper also learns it",
    )

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        taus = [task_vector(expert, base) for expert in experts]
        made: dict[tuple[int, ...], list[State]] = {}

        def merged(setting: Setting) -> State:
            members = active(setting, len(taus))
            # A member that is left out must not take its direction from the others.
            chosen = tuple(i for i, _ in members)
            if chosen not in made:
                parts: list[State] = []
                for i in chosen:
                    parts.append(_rejected(taus[i], parts))
                made[chosen] = parts
            coefficients = [c for _, c in members]
            return weighted_sum(base, list(zip(coefficients, made[chosen], strict=True)))

        return merged


def _rejected(tau: State, earlier: Sequence[State]) -> State:
    """τ without its components along ``earlier`` ones, which are orthogonal to each other."""
    out = {key: delta.double() for key, delta in tau.items()}
    for part in earlier:
        share = _inner(out, part) / max(_inner(part, part), torch.finfo(torch.float64).tiny)
        for key, delta in part.items():
            moved = out[key] if key in out else torch.zeros_like(delta, dtype=torch.float64)
            out[key] = moved - share * delta.double()
    return {key: value.to(next(iter(tau.values())).dtype) for key, value in out.items()}


def _inner(a: State, b: State) -> float:
    return sum(float((a[key].double() * b[key].double()).sum()) for key in a.keys() & b.keys())
