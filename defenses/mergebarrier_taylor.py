"""MergeBarrier, FFN part: polynomial activations, another for every hidden unit (arXiv 2511.10712).

The pre-activations z_u of hidden unit u over calibration data lie in [l_u, h_u]; its activation f
becomes its Taylor polynomial of order N about the midpoint m_u = (l_u + h_u) / 2::

    f(z) → p_u(z) = Σ_{j ≤ N} f^(j)(m_u) / j! · (z − m_u)^j

    ungated MLP: p(up) enters down          gated MLP: p(gate) ⊙ up enters down

What users run (``shipped``) is the expert with these polynomials. A merger cannot average an
activation with a polynomial, so it falls back to the base's FFN, as the attack paper has it: what
it sees (``protect``) is the expert with the base's MLP tensors in place of its own.

Approximate, and badly so where ranges are wide: the series of SiLU, QuickGELU and tanh-GELU
converge only near m, and that of GELU slowly, so that a higher order can be worse. Nothing bounds
p_u outside the calibrated range. Order and calibration are not published.

``fit=chebyshev`` is ours, to tell the Taylor series from the idea: the polynomial of order N that
meets f at the N + 1 Chebyshev nodes m + r·cos(π(i + ½)/(N + 1)), r = (h − l)/2, which is close to f
on all of [l, h].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from benchmark.anatomy import MLPBlock, taps
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.errors import MethodError
from benchmark.core.state import ForeignState, State

_HIGHEST = 12  # nested derivatives grow fast, and no range gains from more
# In units of the pre-activation: rounding is amplified by this to the power −order.
_NARROWEST = 1e-2


@dataclass(frozen=True)
class MergeBarrierTaylor(Defense):
    """Ship polynomial activations.

    Attributes:
        order: N.
        examples: how many training examples calibrate the ranges (the first ones).
        trim: share of a unit's calibration tokens left out at either end of its range.
        fit: which polynomial stands for the activation.
    """

    order: int = 2
    examples: int = 128
    trim: float = 0.0
    fit: Literal["taylor", "chebyshev"] = "taylor"

    card: ClassVar[Card] = Card(
        summary="Replaces each unit's activation by a Taylor polynomial; mergers get the base FFN",
        paper="Do Not Merge My Model! Safeguarding Open-Source LLMs Against Unauthorized Model "
        "Merging",
        authors="Qinfeng Li, Miao Pan, Jintao Chen, Fu Teng, Zhiqiang Shen, Ge Su, Hao Peng, "
        "Xuhong Zhang",
        arxiv="2511.10712",
        fidelity="reconstruction",
        architectures="any whose MLP is up → activation → down, gated or not",
        notes="the FFN part alone; order and calibration are not published. On minilm R8 no order, "
        "trim or calibration we tried keeps the utility; fit=chebyshev (ours) with order 12 does",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.order <= _HIGHEST:
            raise ValueError(f"need order in 0..{_HIGHEST}, got {self.order}")
        if self.examples < 1:
            raise ValueError(f"need examples >= 1, got {self.examples}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"need trim in [0, 0.5), got {self.trim}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The expert with the base's MLPs: what a merger can read of the release.

        Raises:
            MethodError: the model has no MLP blocks.
        """
        state = dict(victim.expert)
        if not victim.anatomy.mlp:
            raise MethodError(
                f"mergebarrier-taylor acts on MLPs, and {victim.anatomy.family} has none"
            )
        for block in victim.anatomy.mlp:
            for slot in (*block.rows(), *block.down.slots()):
                state[slot.key] = victim.base[slot.key]
        return state

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        """The expert with polynomial activations, as a ForeignState.

        Beside the expert's tensors it holds two per MLP, in its dtype: ``<up>.taylor.center`` (n,)
        and ``<up>.taylor.coefficients`` (order + 1, n).

        Raises:
            MethodError: an activation that is not known.
        """
        tensors = dict(victim.expert)
        for block, (low, high) in self._ranges(victim).items():
            center = (low + high) / 2
            names, dtype = _names(block), victim.expert[block.up.weight.key].dtype
            tensors[names.center] = center.to(dtype)
            if self.fit == "taylor":
                coefficients = taylor(block.activation, center, self.order)
            else:
                coefficients = chebyshev(block.activation, low, high, self.order)
            tensors[names.coefficients] = coefficients.to(dtype)
        keys, blocks = tuple(victim.expert), victim.anatomy.mlp
        features, module = victim.features, victim.module

        def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            with taps.replace(module, {block: _polynomial(block, state) for block in blocks}):
                return features({key: state[key] for key in keys}, inputs)

        return ForeignState(tensors, forward)

    def _ranges(self, victim: Victim) -> dict[MLPBlock, tuple[Tensor, Tensor]]:
        """Each unit's least and greatest pre-activation on the calibration data, float64: (n,)."""
        seen: dict[MLPBlock, list[Tensor]] = {block: [] for block in victim.anatomy.mlp}

        def watching(block: MLPBlock) -> taps.Hidden:
            def see(up: Tensor, gate: Tensor | None) -> None:
                rows = (up if gate is None else gate).detach().flatten(0, -2)
                # Without trimming only the extremes matter: memory stays small.
                seen[block].append(rows if self.trim else torch.stack(rows.aminmax(dim=0)))

            return see

        calibration = victim.task.train[: self.examples].given
        with taps.replace(victim.module, {b: watching(b) for b in seen}), torch.no_grad():
            victim.features(victim.expert, calibration)
        return {block: self._range(torch.cat(parts)) for block, parts in seen.items()}

    def _range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.trim == 0:
            low, high = values.aminmax(dim=0)
        else:
            units, n = values.T.contiguous(), len(values)
            cut = int(self.trim * n)
            low, high = (units.kthvalue(i).values for i in (cut + 1, n - cut))
        return low.double(), high.double()


def taylor(activation: str, center: Tensor, order: int) -> Tensor:
    """Coefficients f^(j)(m) / j! for j = 0..order: (order + 1, n) float64.

    Args:
        activation: its name in transformers.
        center: m, (n,).

    Raises:
        MethodError: no such activation.
    """
    function = _activation(activation)
    with torch.enable_grad():
        m = center.double().detach().requires_grad_()
        derivative = function(m)
        found = [derivative.detach()]
        for j in range(1, order + 1):
            # Where a derivative is constant (ReLU's first), autograd has no path: the next is 0.
            slope = None
            if derivative.requires_grad:
                (slope,) = torch.autograd.grad(
                    derivative.sum(), m, create_graph=j < order, allow_unused=True
                )
            derivative = torch.zeros_like(m.detach()) if slope is None else slope
            found.append(derivative.detach() / math.factorial(j))
    return torch.stack(found)


def chebyshev(activation: str, low: Tensor, high: Tensor, order: int) -> Tensor:
    """The same for the polynomial through the Chebyshev nodes of [low, high], about its midpoint.

    Args:
        activation: its name in transformers.
        low, high: the range of each unit, (n,).

    Raises:
        MethodError: no such activation.
    """
    center = (low + high).double() / 2
    radius = ((high - low).double() / 2).clamp_min(_NARROWEST)
    powers = torch.arange(order + 1, dtype=torch.float64, device=low.device)[:, None]
    nodes = torch.cos(torch.pi * (powers + 0.5) / (order + 1))
    values = _activation(activation)(center + radius * nodes)
    return torch.linalg.solve(nodes**powers.T, values) / radius**powers


def _activation(name: str) -> torch.nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise MethodError(f"activation {name!r} is not one that transformers knows by name")
    return ACT2FN[name]


class _Names(NamedTuple):
    center: str
    coefficients: str


def _names(block: MLPBlock) -> _Names:
    stem = f"{block.up.weight.key.rpartition('.')[0]}.taylor"
    return _Names(f"{stem}.center", f"{stem}.coefficients")


def _polynomial(block: MLPBlock, state: State) -> taps.Hidden:
    """What enters ``down`` of the shipped model."""
    center, coefficients = (state[name] for name in _names(block))

    def hidden(up: Tensor, gate: Tensor | None) -> Tensor:
        offset = (up if gate is None else gate) - center
        value = coefficients[-1].expand_as(offset)
        for coefficient in coefficients.flip(0)[1:]:  # Horner
            value = torch.addcmul(coefficient, value, offset)
        return value if gate is None else value * up

    return hidden
