"""A rational free-rider's gain, and what a defense takes away from it (DESIGN section 4).

G and protection are computed here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark.core.errors import MethodError
from benchmark.core.records import Cell
from benchmark.evaluation import thresholds

Floats = NDArray[np.float64]


class Gains(NamedTuple):
    """G in four situations.

    ``outside``: G0, what the free-rider has without merging the release; ``reference``: the same
    with the undefended expert as release. Which cells count hangs on the latter, so that it is the
    same for every defense. ``alone``: that outside option is the release itself, used alone (and
    not the base or partners, which no release has a part in).
    """

    attacked: float
    undefended: float
    outside: float
    reference: float
    alone: bool = True

    @classmethod
    def made(cls, values: Iterable[float], *, alone: bool) -> Gains:
        """From G in each of ``SITUATIONS``."""
        attacked, undefended, outside, reference = values
        return cls(attacked, undefended, outside, reference, alone)

    @classmethod
    def of(cls, cell: Cell) -> Gains | None:
        """Those of a measured cell; None for one that failed or was skipped."""
        found = (cell.gain, cell.gain_undefended, cell.gain_outside, cell.gain_reference)
        if cell.status not in ("ok", "no-benefit") or None in found:
            return None
        values = (float(value) for value in found if value is not None)
        return cls.made(values, alone=is_release(cell.outside_choice))

    @property
    def benefit(self) -> float:
        """What merging the undefended expert gains: the cell's weight, whatever the defense."""
        return self.undefended - self.reference if self.status == "ok" else 0.0

    @property
    def status(self) -> Literal["ok", "no-benefit"]:
        """Whether merging the undefended expert gains enough for there to be something to take."""
        counts = thresholds.has_benefit(self.undefended, self.reference)
        return "ok" if counts else "no-benefit"

    @property
    def raised(self) -> bool:
        """Whether the release itself gives away what a merge would have gained."""
        gives = self.alone and thresholds.raises_outside(self.outside, self.reference)
        return self.status == "ok" and (gives or self.emptied)

    @property
    def emptied(self) -> bool:
        """Whether the release leaves no benefit of merging where there was one."""
        return self.status == "ok" and not thresholds.has_benefit(self.undefended, self.outside)

    @property
    def protection(self) -> float | None:
        """1 − (G(attacked) − G0) / (G(undefended) − G0), raw; None where there was no benefit.

        What a release used alone adds to G0 is given away, not protected: it counts up to the
        undefended expert's, and a release that leaves no benefit protects nothing.
        """
        if self.status == "no-benefit":
            return None
        left, benefit = self.terms()
        return ratio(float(left), float(benefit))

    def terms(self, drawn: Floats | None = None) -> tuple[Floats, Floats]:
        """Numerator and denominator, which add up over victims and seeds.

        Of these gains, or of resamples of them ``drawn`` (n, 4) under the same verdict: () or (n,).
        """
        attacked, undefended, outside, reference = (
            np.asarray(self[:4]) if drawn is None else drawn.T
        )
        if self.emptied:
            return undefended - reference, undefended - reference
        if self.alone:
            outside = np.minimum(outside, reference)
        return attacked - outside, undefended - outside


#: The situations of which outcomes are kept, in the order of :class:`Gains`.
SITUATIONS = Gains._fields[:4]


def is_release(choice: str) -> bool:
    """Whether an outside option of this name is the release, alone or adapted."""
    return choice.startswith("released")


def ratio(left: float, benefit: float) -> float:
    """1 − left / benefit; NaN unless there is a benefit."""
    return 1 - left / benefit if benefit > 0 else math.nan


def units(expert: Mapping[str, float], *, secrets: bool) -> dict[str, float]:
    """What counts as 1 of each task: its own expert's accuracy; of secrets, all of them."""
    return dict.fromkeys(expert, 1.0) if secrets else dict(expert)


def normalized(accuracy: Mapping[str, float], unit: Mapping[str, float]) -> dict[str, float]:
    """Each accuracy in that task's own unit.

    Raises:
        MethodError: an expert answers nothing right: there is no skill to take.
    """
    for task in accuracy:
        if not unit[task] > 0:
            raise MethodError(f"the expert for {task} answers nothing right; train it otherwise")
    return {task: accuracy[task] / unit[task] for task in accuracy}


def accuracies(correct: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Task → share of examples that are right."""
    return {task: float(bits.mean()) for task, bits in correct.items()}


def gain(correct: Mapping[str, np.ndarray], unit: Mapping[str, float]) -> float:
    """G: mean normalised accuracy over the tasks of ``correct``."""
    values = normalized(accuracies(correct), unit)
    return sum(values.values()) / len(values)
