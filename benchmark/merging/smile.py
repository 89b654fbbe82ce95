"""SMILE: low-rank experts behind a router in every Linear (arXiv 2408.10174). No training.

With ΔW_i = W_i − W_0 = U·S·Vᵀ of expert i, an input x of the Linear goes to one expert

    g = argmax_i ‖V_{i,κ}ᵀ·x‖,   y = W_0·x + b_0 + U_{g,k}·S_{g,k}·V_{g,k}ᵀ·x + (b_g − b_0)

κ = ``gate_rank``, k = ``rank``. ``route=linear`` decides per token in every Linear, as published.
``route=block`` is ours: one decision per example for all Linears of an attention or MLP block (the
squared norms summed over tokens, V from the stacked ΔW of those that read the block's input), so
that no block mixes projections of two experts, which a lock on one of them would punish. Only the
Linears of blocks have experts; all else is the base's. The merged model is larger than its members
and of another architecture: task-aware track.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy, AttentionBlock, Linear, MLPBlock, taps
from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import ForeignState, State
from benchmark.merging.streaming import wide
from benchmark.merging.tau import UnweightedMerger, active


@dataclass(frozen=True)
class SMILE(UnweightedMerger):
    """A sparse mixture of low-rank experts.

    Attributes:
        rank: k of each expert's ΔW.
        gate_rank: κ of the router.
        route: what decides together, a ``linear`` per token or a ``block`` per example.
    """

    rank: int = 64
    gate_rank: int = 16
    route: Literal["linear", "block"] = "block"

    card: ClassVar[Card] = Card(
        summary="Low-rank experts behind a training-free router in every Linear",
        paper="SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained "
        "Foundation Models",
        authors="Anke Tang, Li Shen, Yong Luo, Shuai Xie, Han Hu, Lefei Zhang, Bo Du, Dacheng Tao",
        arxiv="2408.10174",
        fidelity="reconstruction",
        architectures="any whose block Linears are called as modules (not nn.MultiheadAttention)",
        notes="route=linear is published; route=block and the ranks are ours",
    )
    task_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.rank, self.gate_rank) < 1:
            raise ValueError("rank and gate_rank must be at least 1")

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        if knowledge is None:
            raise MethodError("SMILE builds another model: it needs to know how models are run")
        run, module = knowledge.forward, knowledge.module
        units = list(_units(knowledge.anatomy, self.route))
        parts = [self._expert(base, expert, units) for expert in experts]

        def merged(setting: Setting) -> State:
            used = [i for i, _ in active(setting, len(experts))]
            held = {f"{i}.{key}": value for i in used for key, value in parts[i].items()}

            def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
                after: dict[str, taps.After] = {}
                for number, unit in enumerate(units):
                    router = _Router(state, unit, number, used, whole=self.route == "block")
                    for linear in unit.linears:
                        key = linear.weight.key
                        after[key] = _chained(after.get(key), router.through(linear))
                with taps.follow(module, after):
                    return run({key: state[key] for key in base}, inputs)

            return ForeignState({**base, **held}, forward)

        return merged

    def _expert(self, base: State, expert: State, units: Sequence[_Unit]) -> State:
        """Per Linear ``u`` (n, k) with S, ``v`` (k, d) and ``b`` (n,); per unit its ``gate``."""
        out: State = {}
        for number, unit in enumerate(units):
            deltas = []
            for linear in unit.linears:
                delta = wide(linear.weight.read(expert)) - wide(linear.weight.read(base))
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                name = _name(linear)
                out[f"{name}.u"] = u[:, : self.rank] * s[: self.rank]
                out[f"{name}.v"] = v[: self.rank].contiguous()
                if linear.bias is not None:
                    out[f"{name}.b"] = linear.bias.read(expert) - linear.bias.read(base)
                if linear in unit.readers:
                    deltas.append((delta, v))
            stacked = torch.cat([delta for delta, _ in deltas])
            v = deltas[0][1] if len(deltas) == 1 else torch.linalg.svd(stacked)[2]
            out[f"{number}.gate"] = v[: self.gate_rank].contiguous()
        return out


@dataclass(frozen=True)
class _Unit:
    """Linears that one decision serves; ``readers`` see the input it is made from."""

    readers: tuple[Linear, ...]
    followers: tuple[Linear, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.readers + self.followers


class _Router:
    """Sends what enters one unit to one of the experts."""

    def __init__(
        self, state: State, unit: _Unit, number: int, experts: Sequence[int], whole: bool
    ) -> None:
        self.state, self.unit, self.experts, self.whole = state, unit, experts, whole
        self.gates = [state[f"{i}.{number}.gate"] for i in experts]
        self.shares: Tensor = torch.empty(0)

    def through(self, linear: Linear) -> taps.After:
        """What the Linear gives, its expert's part added."""
        parts = [
            {p: self.state.get(f"{i}.{_name(linear)}.{p}") for p in "uvb"} for i in self.experts
        ]
        decides = linear in self.unit.readers

        def after(x: Tensor, output: Tensor) -> Tensor:
            if decides:
                self.shares = self._decide(x)
            total = output.clone()
            for part, share in zip(parts, self.shares.unbind(-1), strict=True):
                u, v, b = part["u"], part["v"], part["b"]
                assert u is not None
                assert v is not None
                step = (linear.weight.entering(x) @ v.T) @ u.T
                step = share[..., None] * (step if b is None else step + b)
                own = linear.weight.cut(total, -1)
                own += step.reshape(own.shape)
            return total

        return after

    def _decide(self, x: Tensor) -> Tensor:
        """One-hot over experts: (..., experts)."""
        scores = torch.stack([(x @ gate.T).square().sum(-1) for gate in self.gates], -1)
        if self.whole and scores.ndim > 2:
            scores = scores.sum(-2, keepdim=True).expand_as(scores)
        best = scores.argmax(-1)
        return torch.nn.functional.one_hot(best, len(self.experts)).to(x.dtype)


def _units(anatomy: Anatomy, route: str) -> list[_Unit]:
    blocks: list[AttentionBlock | MLPBlock] = [*anatomy.attention, *anatomy.mlp]
    found = list[_Unit]()
    for block in blocks:
        if isinstance(block, AttentionBlock):
            unit = _Unit((block.q, block.k, block.v), (block.o,))
            if block.joint is not None:
                joint = block.joint
                further = () if joint.o is None else (joint.o,)
                found += _routed(_Unit((joint.q, joint.k, joint.v), further), route)
        else:
            gate = () if block.gate is None else (block.gate,)
            unit = _Unit((block.up, *gate), (block.down,))
        found += _routed(unit, route)
    return found


def _routed(unit: _Unit, route: str) -> list[_Unit]:
    return [unit] if route == "block" else [_Unit((linear,)) for linear in unit.linears]


def _name(linear: Linear) -> str:
    slot = linear.weight
    parts = ("" if part is None else f"{part[0]}:{part[1]}" for part in (slot.rows, slot.columns))
    where = ",".join(parts)
    return slot.key if where == "," else f"{slot.key}[{where}]"


def _chained(first: taps.After | None, second: taps.After) -> taps.After:
    """Both, one after the other (a fused weight holds several Linears)."""
    if first is None:
        return second
    return lambda x, output: second(x, first(x, output))
