"""ProDistill: layer after layer, coefficients with which the merged layer does what experts' do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Access, Card, Knowledge
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.merging.informed import Inputs, Learner, combined
from benchmark.merging.streaming import moved


@dataclass(frozen=True)
class ProDistill(Learner[Inputs]):
    """With f_l(W; h) the l-th layer, W_l = W0_l + Σ_i Λ_i,l ⊙ τ_i,l, and on ``per_task`` unlabelled
    inputs of task i, h what enters the layer in the merged model (the layers before it merged, the
    later ones not yet run) and h_i what enters it in expert i:

        min_Λ Σ_i Σ_x ‖f_l(W_l; h) − f_l(W_i,l; h_i)‖²

    one coefficient per entry of every tensor, from ``start`` by ``steps`` of Adam on all inputs at
    once, layer by layer from the input up. Tensors outside the layers are merged at ``start``.

    A layer is the module whose name ends with the first number in the names of its attention and
    MLP tensors (``encoder.layer.0``, ``h.0``): it holds whole blocks with their norms and
    residuals, in every architecture of :mod:`benchmark.anatomy`. It is run on its own with the
    arguments that it got in the whole model. A layer that does not run keeps ``start``.
    """

    card: ClassVar[Card] = Card(
        summary="Elementwise coefficients, distilled layer by layer from each expert",
        paper="Scalable Model Merging with Progressive Layer-wise Distillation",
        authors="Jing Xu, Jiazheng Li, Jingzhao Zhang",
        arxiv="2502.12706",
        fidelity="faithful",
        notes="dual inputs, elementwise coefficients from 0.3 (unclamped), squared error summed, "
        "Adam at 1e-2 as in the official vision code; 32 inputs per task and 40 full-batch steps "
        "where it has 64 and 100 epochs in batches of 128",
    )
    access: ClassVar[Access] = Access.UNLABELED

    per_task: int = 32
    steps: int = 40
    rate: float = 1e-2
    start: float = 0.3

    def __post_init__(self) -> None:
        if min(self.per_task, self.steps) < 1 or not self.rate > 0:
            raise ValueError("per_task and steps must be at least 1, rate > 0")

    def draw(self, knowledge: Knowledge, rng: torch.Generator) -> dict[str, Inputs]:
        return dict(knowledge.unlabeled(self.per_task, rng))

    def learn(
        self,
        base: State,
        experts: Sequence[State],
        taus: Sequence[State],
        examples: Mapping[str, Inputs],
        knowledge: Knowledge,
        rng: torch.Generator,
    ) -> State:
        """Raises MethodError where the anatomy has no blocks, or their modules cannot be run."""
        order = layers(knowledge.anatomy)
        if not order:
            raise MethodError("prodistill needs attention or MLP blocks, and this model has none")
        merged = dict(base)
        for key in moved(taus):
            shares = [(torch.tensor(self.start), tau[key]) for tau in taus if key in tau]
            merged[key] = combined(base[key], [(c.to(t.device), t) for c, t in shares])
        # Experts never change: what their layers give is seen in one pass each.
        taught = [
            calls(knowledge, expert, inputs, order)
            for expert, inputs in zip(experts, examples.values(), strict=True)
        ]
        for layer in order:
            keys = [key for key in moved(taus) if key.startswith(f"{layer}.")]
            targets = [call.output for seen in taught for call in seen[layer]]
            if not keys or not targets:
                continue
            given = [
                call
                for inputs in examples.values()
                for call in calls(knowledge, merged, inputs, [layer])[layer]
            ]
            module = knowledge.module.get_submodule(layer)
            own = {key: merged[key] for key in merged if key.startswith(f"{layer}.")}
            merged.update(self._distil(base, taus, keys, own, module, layer, given, targets))
            entries = sum(value.numel() for value in own.values() if value.ndim > 1)
            rows = sum(target.numel() // target.shape[-1] for target in targets)
            knowledge.charge(self.steps, 0)
            # Two per weight and row forward, and twice that backward.
            knowledge.budget.flops += 6.0 * self.steps * rows * entries
        return merged

    def _distil(
        self,
        base: State,
        taus: Sequence[State],
        keys: Sequence[str],
        own: State,
        module: nn.Module,
        layer: str,
        given: Sequence[Call],
        targets: Sequence[Tensor],
    ) -> State:
        """The trained tensors of one layer."""
        held = {
            (i, key): torch.full_like(tau[key], self.start, dtype=torch.float32, requires_grad=True)
            for i, tau in enumerate(taus)
            for key in keys
            if key in tau
        }

        def state() -> State:
            pairs = {
                key: [(c, taus[i][key]) for (i, k), c in held.items() if k == key] for key in keys
            }
            return {key: combined(base[key], pairs[key]) for key in keys}

        optimizer = torch.optim.Adam(held.values(), lr=self.rate)
        for _ in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                tensors = {**own, **state()}
                losses = [
                    (run(module, layer, tensors, call) - target).float().square().sum()
                    for call, target in zip(given, targets, strict=True)
                ]
                torch.stack(losses).sum().backward()
            optimizer.step()
        with torch.no_grad():
            return state()


class Call(NamedTuple):
    """What a layer was called with, and the hidden states it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def layers(anatomy: Anatomy) -> list[str]:
    """The modules that hold the blocks, each after the one it reads."""
    keys = [block.q.weight.key for block in anatomy.attention]
    keys += [mlp.up.weight.key for mlp in anatomy.mlp]
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if first is not None:
            found[".".join(parts[: first + 1])] = None
    return list(found)


def calls(
    knowledge: Knowledge, state: State, inputs: Inputs, order: Sequence[str]
) -> dict[str, list[Call]]:
    """Every call of each layer while ``state`` runs on ``inputs``."""
    found: dict[str, list[Call]] = {layer: [] for layer in order}
    with torch.no_grad(), _watched(knowledge.module, found):
        knowledge.features(state, inputs)
    return found


def run(module: nn.Module, layer: str, tensors: State, call: Call) -> Tensor:
    """The hidden states that the layer gives on its own, with ``tensors`` named as in the model."""
    local = {key.removeprefix(f"{layer}."): value for key, value in tensors.items()}
    return _hidden(torch.func.functional_call(module, local, call.args, call.kwargs))


@contextmanager
def _watched(module: nn.Module, found: dict[str, list[Call]]) -> Iterator[None]:
    handles = []
    try:
        for layer in found:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, layer: str = layer) -> None:
                plain = {name: value for name, value in kwargs.items() if _stateless(value)}
                positional = tuple(value if _stateless(value) else None for value in args)
                found[layer].append(Call(positional, plain, _hidden(output)))

            owner = module.get_submodule(layer)
            handles.append(owner.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stateless(value: Any) -> bool:
    """Whether an argument is the same at every call: a cache of keys and values grows."""
    if isinstance(value, (tuple, list)):
        return all(_stateless(item) for item in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _hidden(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise MethodError(f"prodistill: a layer gives {type(found).__name__}, not hidden states")
    return found
