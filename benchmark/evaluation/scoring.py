"""A rational free-rider's gain, and what a defense takes away from it (DESIGN section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmark.core.errors import MethodError

NO_BENEFIT = 0.02
UTILITY_GATE = 0.015


def normalized(accuracy: Mapping[str, float], expert: Mapping[str, float]) -> dict[str, float]:
    """Each accuracy over that task's own expert's accuracy.

    Raises:
        MethodError: an expert answers nothing right: there is no skill to take.
    """
    for task in accuracy:
        if not expert[task] > 0:
            raise MethodError(f"the expert for {task} answers nothing right; train it otherwise")
    return {task: accuracy[task] / expert[task] for task in accuracy}


def accuracies(correct: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Task → share of examples that are right."""
    return {task: float(bits.mean()) for task, bits in correct.items()}


def gain(correct: Mapping[str, np.ndarray], expert: Mapping[str, np.ndarray]) -> float:
    """G: mean normalised accuracy over the victim's and the partners' tasks."""
    values = normalized(accuracies(correct), accuracies(expert))
    return sum(values.values()) / len(values)


def benefit(undefended: float, outside: float) -> float | None:
    """G(undefended) − G0, or None where there was nothing to protect."""
    value = undefended - outside
    return value if value >= NO_BENEFIT else None


def protection(attacked: float, undefended: float, outside: float) -> float | None:
    """1 − (G(attacked) − G0) / (G(undefended) − G0), raw; None where there was no benefit."""
    value = benefit(undefended, outside)
    return None if value is None else 1.0 - (attacked - outside) / value
