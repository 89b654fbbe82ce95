"""The checks of what any method does to its inputs, to the process, and under a seed."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from unittest import SkipTest

import torch
from torch import Tensor

from benchmark.conformance import guards
from benchmark.conformance.case import REFUSALS, AnyCase, Result
from benchmark.conformance.definition import random_states_kept, settings_kept
from benchmark.conformance.frame import CheckFailed, Checks, describe
from benchmark.conformance.measure import Watch
from benchmark.conformance.testbed import ARCHITECTURES, Tiny, renew_modules
from benchmark.core import state as states
from benchmark.core.errors import CheckpointError
from benchmark.core.state import ForeignState, State, digest, merged_well

#: ‖ΔW‖ / ‖W‖ that another order of summation explains; training multiplies it.
ROUNDING, ROUNDING_TRAINED = 1e-3, 1e-1
#: Share of the model's size that may stay in memory after a call (small constants, kept masks).
KEPT = 0.1

#: Part of the list of every kind of method.
check: Checks[AnyCase] = Checks("method")


@check
def same_tensors(case: AnyCase) -> None:
    """The result has the base's keys, shapes and dtypes, as plain tensors without gradients."""
    base = case.testbed.base()
    for name, state in case.result.items():
        if type(state) is dict:
            fits({key: value.nan_to_num() for key, value in state.items()}, base, name)
        elif not (case.several and isinstance(state, ForeignState)):
            raise CheckFailed(f"{name} is a {type(state).__name__}; mergers want a plain dict")
        for key, value in state.items():
            if type(key) is not str or type(value) is not Tensor:
                raise CheckFailed(f"{name}: {key!r} is a {type(value).__name__}, no plain tensor")
            if value.requires_grad:
                raise CheckFailed(f"{name}: tensor {key!r} requires gradients; detach it")


@check
def finite(case: AnyCase) -> None:
    """No tensor of the result holds NaN or infinity."""
    for name, state in case.result.items():
        try:
            states.finite(state, name)
        except CheckpointError as error:
            raise CheckFailed(str(error)) from None


@check
def sequences(case: AnyCase) -> str | None:
    """Where answers are several words of a vocabulary it works too, or refuses in one line."""
    if "llama" not in case.accepted():
        return "works on no causal model"
    try:
        case.run(case.inputs(Tiny("llama", tokens=3)))
    except REFUSALS as refusal:
        if len(str(refusal).splitlines()) > 1:
            raise CheckFailed(f"refuses in several lines: {refusal}") from None
        return f"refuses: {refusal}"
    return None


@check.binding
def deterministic(case: AnyCase) -> None:
    """One seed gives one result, bit for bit."""
    equal(case.run(), case.result, "a second call with the same seed")


@check
def seeded(case: AnyCase) -> str | None:
    """Another seed gives another result, if it draws at all."""
    if _digest(case.run(seed=1)) != _digest(case.result):
        return None
    rng = torch.Generator().manual_seed(1)
    start, inputs = rng.get_state(), case.inputs(case.testbed)
    with Watch() as watch:
        case.call(case.method, inputs, rng)
    if reason := case.excuses_draws(inputs):
        return reason
    if watch.draws or not torch.equal(rng.get_state(), start):
        raise CheckFailed("draws random numbers that seeds do not change: draw them from rng")
    return "draws nothing: one result for all seeds"


@check
def global_random_state(case: AnyCase) -> None:
    """It neither reads nor moves the global generators of torch, numpy and random."""
    inputs = case.inputs(case.testbed)
    guards.reseed(1)
    before = guards.random_states()
    result = case.run(inputs, world=None)
    random_states_kept(before, "a call")
    # A second world, since a generator that is read and put back looks untouched.
    if _digest(case.run(world=2)) != _digest(result):
        raise CheckFailed("the result depends on a global generator; draw from rng only")


@check.binding
def inputs_unchanged(case: AnyCase) -> None:
    """What it is given stays as it was, module included; a second call spoils no first result."""
    renew_modules()
    inputs, module = case.inputs(case.testbed), case.testbed.module()
    given, facts, built = case.given(inputs), case.facts(inputs), _built(module)
    before = {name: digest(state) for name, state in given.items()}
    weights = digest(_tensors(module))

    def unchanged() -> None:
        after = case.given(inputs)
        for name, value in before.items():
            # Both the dict that was handed over and what now stands in its place.
            if value != digest(given[name]) or value != digest(after[name]):
                raise CheckFailed(f"writes to its input: {name}; work on a copy, dict(state)")
        others = case.facts(inputs)
        for name, fact in facts.items():
            if others[name] is not fact and others[name] != fact:
                raise CheckFailed(f"replaces or edits {name}, which it was given")
        if _built(module) != built or digest(_tensors(module)) != weights:
            raise CheckFailed("writes to the module it is given")

    try:
        result = case.run(inputs)
        made = _digest(result)
        unchanged()  # after each call, since the second may undo the first
        case.exercise(inputs, torch.Generator().manual_seed(0))
        unchanged()
    finally:
        renew_modules()  # the next check runs on it too
    if _digest(result) != made:
        raise CheckFailed("a second call writes to what the first one returned; return copies")


@check
def own_memory(case: AnyCase) -> None:
    """A tensor is a whole, unmodified input or owns its memory: it is no view into another."""
    inputs = case.inputs(case.testbed)
    given = {_place(v): v for state in case.states(inputs) for v in state.values()}
    for state in case.run(inputs).values():
        tied: dict[int, str] = {}
        for key, value in state.items():
            place = _place(value)
            source = given.get(place, value)
            if place in tied:
                raise CheckFailed(f"tensors {tied[place]!r} and {key!r} share memory; .clone() one")
            if value.data_ptr() != source.data_ptr() or value.stride() != source.stride():
                raise CheckFailed(f"tensor {key!r} is a view into an input; .clone() it")
            if 0 in value.stride() and value.numel() > 1:
                raise CheckFailed(f"tensor {key!r} is expanded from fewer numbers; .clone() it")
            tied[place] = key


@check
def architectures(case: AnyCase) -> str:
    """It runs on every tiny architecture, or refuses one by a MethodError that says why."""
    said = []
    for architecture in ARCHITECTURES:
        try:
            fit(case.on(architecture), Tiny(architecture).base())
        except REFUSALS as refusal:
            if not str(refusal):
                raise CheckFailed(f"refuses {architecture} without a word") from None
            said.append(f"refuses {architecture} ({refusal})")
        except Exception as error:
            raise CheckFailed(f"on {architecture}: {describe(error)}") from error
        else:
            said.append(architecture)
    return ", ".join(said)


@check
def bfloat16(case: AnyCase) -> str | None:
    """From bfloat16 weights it makes bfloat16 weights, or refuses by a MethodError."""
    inputs = case.inputs(case.testbed, dtype=torch.bfloat16)
    try:
        result = case.run(inputs)
    except REFUSALS as refusal:
        return f"refuses: {refusal}"
    fit(result, case.states(inputs)[0])
    return None


@check
def device(case: AnyCase) -> str:
    """On another device it makes what it makes on the CPU (training: a finite result)."""
    other = other_device()
    if other is None:
        raise SkipTest("no CUDA device on this machine")
    result = case.on_device(other)
    fit(result, case.testbed.base())
    if case.trains:
        return f"{other.type}: runs (training there is not compared)"
    return f"{other.type}: {near(result, case.result, ROUNDING, str(other))}"


@check
def pickles(case: AnyCase) -> None:
    """It survives pickling, and the copy makes the same result."""
    _copied(case, pickle.loads(pickle.dumps(case.method)))


@check
def deep_copies(case: AnyCase) -> None:
    """It survives copy.deepcopy, and the copy makes the same result."""
    _copied(case, copy.deepcopy(case.method))


@check
def threads(case: AnyCase) -> str:
    """The number of CPU threads changes the result by rounding at most."""
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append(case.run())
    limit = ROUNDING_TRAINED if case.trains else ROUNDING
    return near(made[1], made[0], limit, "two threads")


@check
def settings(case: AnyCase) -> None:
    """Grad mode, threads, default dtype and device, environment and folder stay as they were."""
    inputs = case.inputs(case.testbed)
    before = guards.settings()
    case.run(inputs)
    settings_kept(before, "a call")


@check
def cost(case: AnyCase) -> str:
    """Time and peak memory (tensors that torch operations return); nothing is kept afterwards."""
    inputs = case.inputs(case.testbed)
    start = time.perf_counter()
    case.run(inputs)
    seconds = time.perf_counter() - start
    base, second, *_ = case.states(inputs)
    size = sum(v.numel() * v.element_size() for v in base.values())
    millions = sum(v.numel() for v in base.values()) / 1e6
    held = weakref.ref(next(iter(second.values())).untyped_storage())
    del base, second, _
    with Watch() as watch:
        result = case.run(inputs)
    del result, inputs
    if held() is not None or watch.live > KEPT * size:
        gc.collect()  # slow, and only cycles need it
    if held() is not None:
        raise CheckFailed("keeps the tensors it was given in memory after the call")
    if watch.live > KEPT * size:
        raise CheckFailed(f"keeps {watch.live / size:.1f}× the model in memory after the call")
    return (
        f"{seconds:.3f} s for {millions:.3f} M parameters, {seconds / millions:.2f} s per million; "
        f"peak memory {watch.peak / 2**20:.2f} MiB ({watch.peak / size:.1f}× the model)"
    )


def other_device() -> torch.device | None:
    """A device besides the CPU on which methods can run (in float64, so no mps)."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def fits(state: State, base: State, name: str) -> None:
    """Fail unless ``state`` can stand in for ``base``."""
    try:
        merged_well(state, base, name)
    except CheckpointError as error:
        raise CheckFailed(str(error)) from None


def fit(result: Result, base: State) -> None:
    """:func:`fits` for every State."""
    for name, state in result.items():
        fits(state, base, name)


def equal(result: Result, reference: Result, what: str) -> None:
    """Fail unless both hold the same bits; ``what`` gave ``result``."""
    for name, state in reference.items():
        for key, value in state.items():
            if digest({key: result[name][key]}) != digest({key: value}):
                raise CheckFailed(f"{what} gives another tensor {key!r} in {name}")


def _digest(result: Result) -> list[str]:
    return [digest(state) for state in result.values()]


def _copied(case: AnyCase, again: object) -> None:
    if again != case.method:
        raise CheckFailed("the copy does not equal the original")
    equal(case.run(method=again), case.result, "the copy")


def near(result: Result, reference: Result, limit: float, what: str) -> str:
    """Fail if a tensor is off by more than ``limit`` of its norm; else say by how much."""
    worst = 0.0
    for name, state in reference.items():
        for key, value in state.items():
            one, other = result[name][key].detach().double(), value.detach().double()
            off = float((one - other).norm() / other.norm())
            if not off <= limit:
                raise CheckFailed(f"{what}: tensor {key!r} is off by {off:.1e} of its norm")
            worst = max(worst, off)
    return f"tensors differ by {worst:.0e} at most" if worst else "bit for bit"


def _tensors(module: torch.nn.Module) -> State:
    """Parameters and buffers, those included that no checkpoint holds."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _built(module: torch.nn.Module) -> dict[str, object]:
    """How a module is built and run: its parts, what they override, their hooks and modes."""
    return {
        name: (
            id(part),
            part.training,
            sorted(vars(part)),
            [id(hook) for key, hooks in vars(part).items() if key.endswith("_hooks") and hooks
             for hook in hooks.values()],
        )
        for name, part in module.named_modules()
    }  # fmt: skip


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
