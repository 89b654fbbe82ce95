"""A model as a ``State``: names → tensors, under the in-memory names of the loaded model.

Everything that moves through the benchmark (base, expert, released, recovered, merged) is a State.
Reading and writing folders lives in :mod:`benchmark.io.folders`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmark.core.errors import CheckpointError

State = dict[str, Tensor]

#: Forward pass: (state, inputs by name) → features (n, d).
Forward = Callable[[State, Mapping[str, Tensor]], Tensor]


class ForeignState(State):
    """A release whose modules differ from the base's: its tensors, and how it is run.

    It may hold tensors the base lacks. Only its users see it: mergers get a plain State.
    """

    def __init__(self, tensors: Mapping[str, Tensor], forward: Forward) -> None:
        super().__init__(tensors)
        self.forward = forward


class PerTask(State):
    """A merged model that is told which task an input belongs to: a State for each of some tasks.

    ``common`` serves every other task. Its own tensors are those of ``common``, and under
    ``task:key`` those in which a task's State differs from it.
    """

    def __init__(self, common: State, own: Mapping[str, State]) -> None:
        super().__init__(common)
        self.common, self.own = common, dict(own)
        for task, state in self.own.items():
            self.update({f"{task}:{k}": v for k, v in state.items() if v is not common[k]})

    def of(self, task: str) -> State:
        """The State that serves ``task``."""
        return self.own.get(task, self.common)


def forward_of(state: State, features: Forward) -> Forward:
    """How ``state`` is run: by its own forward if its modules are foreign, else by ``features``.

    A foreign forward runs in inference mode, whoever asks: it cannot tell an attacker's teacher
    from the evaluator. Nothing is differentiated through it.
    """
    if not isinstance(state, ForeignState):
        return features
    own = state.forward

    def alike(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            found = own(state, inputs)
        return found.clone()  # no longer an inference tensor, which autograd would refuse

    return alike


def statistic(key: str) -> bool:
    """Whether the tensor is a running statistic of a batch norm.

    It is floating-point like a weight, and is merged like one; but no gradient reaches it, so the
    fine-tuning loop leaves it as it was (batch norms run in evaluation mode throughout).
    """
    return key.endswith((".running_mean", ".running_var"))


def compatible(state: Mapping[str, Tensor], base: Mapping[str, Tensor], what: str) -> None:
    """Check that ``state`` can stand in for ``base``.

    Raises:
        CheckpointError: names the first missing, unexpected, misshapen, mistyped or
            non-finite tensor.
    """
    for problem, keys in (
        ("lacks", base.keys() - state.keys()),
        ("has an unexpected", state.keys() - base.keys()),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise CheckpointError(f"{what} {problem} tensor {min(keys)!r}{more}")
    for key, reference in base.items():
        value = state[key]
        if value.shape != reference.shape:
            raise CheckpointError(
                f"{what}: tensor {key!r} has shape {tuple(value.shape)}, "
                f"the base has {tuple(reference.shape)}"
            )
        if value.dtype != reference.dtype:
            raise CheckpointError(
                f"{what}: tensor {key!r} is {value.dtype}, the base has {reference.dtype}"
            )
    finite({key: v for key, v in state.items() if v is not base[key]}, what)


def with_variances(merged: State) -> State:
    """A merge whose running variances are none below 0.

    A variance is merged like a weight, as a sum, which may come out negative where a release hides
    which unit is which. 0 is the nearest variance; the free-rider who got NaN would do the same.
    Tensors that need no change are shared.
    """
    if isinstance(merged, ForeignState):
        return merged
    if isinstance(merged, PerTask):
        own = {task: with_variances(state) for task, state in merged.own.items()}
        return PerTask(with_variances(merged.common), own)
    below = [k for k, v in merged.items() if k.endswith(".running_var") and bool((v < 0).any())]
    return {**merged, **{key: merged[key].clamp(min=0) for key in below}} if below else merged


def merged_well(merged: State, base: Mapping[str, Tensor], what: str) -> None:
    """Check a merged model: every State in it as :func:`compatible`, a foreign one for NaN only.

    Raises:
        CheckpointError: as :func:`compatible`.
    """
    if isinstance(merged, ForeignState):
        finite(merged, what)
    elif isinstance(merged, PerTask):
        for task, state in {"any other task": merged.common, **merged.own}.items():
            compatible(state, base, f"{what} for {task}")
    else:
        compatible(merged, base, what)


def finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError if a floating-point tensor of ``state`` holds NaN or infinity, or a
    running variance is negative."""
    for key, value in state.items():
        # A sum is finite only if every entry is (or it overflows, which float64 rules out here).
        if value.is_floating_point() and not torch.isfinite(value.sum(dtype=torch.float64)):
            raise CheckpointError(f"{what}: tensor {key!r} holds NaN or infinity")
        if key.endswith(".running_var") and bool((value < 0).any()):
            raise CheckpointError(
                f"{what}: tensor {key!r} holds a negative variance, of which a batch norm makes NaN"
            )


def ordered(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """``state`` with its keys in the order of ``like``.

    Methods draw and sum tensor by tensor: what a State was read from must not decide the order.
    """
    return {key: state[key] for key in like}


def task_vector(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> State:
    """τ = θ − θ0, without the tensors that did not move (a missing key means zero).

    Integer buffers (position ids) are no parameters and never part of τ.
    """

    def moved(value: Tensor, old: Tensor) -> bool:
        return value.is_floating_point() and value is not old and not torch.equal(value, old)

    return {key: v - base[key] for key, v in state.items() if moved(v, base[key])}


def add(base: Mapping[str, Tensor], tau: Mapping[str, Tensor], scale: float = 1.0) -> State:
    """θ0 + scale · τ. Tensors that τ leaves out are shared with ``base``, not copied."""
    out = dict(base)
    for key, delta in tau.items():
        out[key] = torch.add(base[key], delta, alpha=scale)
    return out


def norm(tau: Mapping[str, Tensor]) -> float:
    """‖τ‖₂ over all tensors."""
    return float(sum(float(t.double().square().sum()) for t in tau.values())) ** 0.5


def rounded(state: Mapping[str, Tensor]) -> State:
    """Every float32 tensor as bfloat16 would store it."""
    out = {k: v.bfloat16().to(v.dtype) if v.dtype == torch.float32 else v for k, v in state.items()}
    return ForeignState(out, state.forward) if isinstance(state, ForeignState) else out


_HALF = (torch.bfloat16, torch.float16)


def half(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors of it are in half precision."""
    return any(value.dtype in _HALF for value in state.values())


def rounded_again(state: Mapping[str, Tensor], rng: torch.Generator) -> State:
    """Every tensor in half precision as if other numbers near it had been rounded.

    One entry in twelve goes to a neighbour: on average the squared error of rounding, 1/12 of a
    step squared. What is rounded already does not tell any other way what rounding costs.
    """
    out = dict(state)
    for key, value in state.items():
        if value.dtype in _HALF:
            drawn = torch.rand(value.shape, generator=rng).to(value.device)
            towards = torch.where(drawn < 1 / 24, torch.inf, -torch.inf).to(value.dtype)
            out[key] = torch.where(drawn < 1 / 12, torch.nextafter(value, towards), value)
    return out


def norm_growth(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest ‖W‖ / ‖W of the reference‖ over tensors of two or more dimensions."""
    ratios = [
        float(value.double().norm() / reference[key].double().norm())
        for key, value in state.items()
        if value.ndim > 1 and value.is_floating_point() and bool(reference[key].any())
    ]
    return max(ratios, default=1.0)


def to_device(state: Mapping[str, Tensor], device: torch.device | str) -> State:
    """The same State on ``device``."""
    return {key: value.to(device) for key, value in state.items()}


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in name order: one for equal States only."""
    total = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().contiguous().cpu()
        total.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
