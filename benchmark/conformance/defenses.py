"""The checks of what a defense does, after those of :mod:`benchmark.conformance.definition`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import re
import time
import weakref
from unittest import SkipTest

import torch
from torch import Tensor

from benchmark import checkpoint
from benchmark.checkpoint import ForeignState, State, compatible, digest
from benchmark.conformance import guards
from benchmark.conformance.definition import check, random_states_kept, settings_kept
from benchmark.conformance.frame import CheckFailed, describe
from benchmark.conformance.measure import Watch
from benchmark.conformance.subjects import (
    REFUSALS,
    DefenseCase,
    accuracy,
    expert,
    fingerprint,
    logits,
    victim,
)
from benchmark.conformance.testbed import ARCHITECTURES, Tiny
from benchmark.contracts import Defense
from benchmark.errors import CheckpointError
from benchmark.evaluation.accuracy import relative_gap

#: METHODS section 1: max |Δlogit| relative to the largest logit, float32.
EXACT = 1e-4
#: ‖ΔW‖ / ‖W‖ that another order of summation explains; training multiplies it.
ROUNDING, ROUNDING_TRAINED = 1e-3, 1e-1
#: Share of the model's size that may stay in memory after a call (small constants, kept masks).
KEPT = 0.1


@check
def same_tensors(case: DefenseCase) -> None:
    """The release has the base's keys, shapes and dtypes, as plain tensors without gradients."""
    release = case.release
    if isinstance(release, ForeignState) or type(release) is not dict:
        raise CheckFailed(f"protect returns {type(release).__name__}; mergers want a plain dict")
    _compatible({key: value.nan_to_num() for key, value in release.items()}, case.testbed.base())
    for key, value in release.items():
        if value.requires_grad:
            raise CheckFailed(f"tensor {key!r} requires gradients; detach it")


@check
def finite(case: DefenseCase) -> None:
    """No tensor of the release holds NaN or infinity."""
    try:
        checkpoint.finite(case.release, "the release")
    except CheckpointError as error:
        raise CheckFailed(str(error)) from None


@check
def deterministic(case: DefenseCase) -> None:
    """One seed gives one release, bit for bit."""
    _equal(case.protect(), case.release, "a second call with the same seed")


@check
def seeded(case: DefenseCase) -> str | None:
    """Another seed gives another release, if it draws at all."""
    if digest(case.protect(seed=1)) != digest(case.release):
        return None
    rng = torch.Generator().manual_seed(1)
    start, owner = rng.get_state(), victim(case.testbed)
    with Watch() as watch:
        case.method.protect(owner, rng)
    if watch.draws or not torch.equal(rng.get_state(), start):
        raise CheckFailed("draws random numbers that seeds do not change: draw them from rng")
    return "draws nothing: one release for all seeds"


@check
def global_random_state(case: DefenseCase) -> None:
    """It neither reads nor moves the global generators of torch, numpy and random."""
    owner = victim(case.testbed)
    guards.reseed(1)
    before = guards.random_states()
    release = case.protect(owner, world=None)
    random_states_kept(before, "protect")
    # A second world, since a generator that is read and put back looks untouched.
    if digest(case.protect(world=2)) != digest(release):
        raise CheckFailed("the release depends on a global generator; draw from rng only")


@check
def inputs_unchanged(case: DefenseCase) -> None:
    """Base, expert, task data and module are never written to."""
    owner = victim(case.testbed)
    pristine = copy.deepcopy(owner.module.state_dict())
    before = fingerprint(owner)
    release = case.protect(owner)
    case.method.shipped(owner, release, torch.Generator().manual_seed(0))
    after = fingerprint(owner)
    owner.module.load_state_dict(pristine)  # the next check runs on it too
    for name, value in before.items():
        if after[name] != value:
            raise CheckFailed(f"writes to victim's {name}; work on a copy, dict(victim.expert)")


@check
def own_memory(case: DefenseCase) -> None:
    """A tensor is a whole, unmodified input or owns its memory: it is no view into another."""
    owner = victim(case.testbed)
    release = case.protect(owner)
    inputs = {_place(v): v for state in (owner.base, owner.expert) for v in state.values()}
    tied: dict[int, str] = {}
    for key, value in release.items():
        place = _place(value)
        source = inputs.get(place, value)
        if place in tied:
            raise CheckFailed(f"tensors {tied[place]!r} and {key!r} share memory; .clone() one")
        if value.data_ptr() != source.data_ptr() or value.stride() != source.stride():
            raise CheckFailed(f"tensor {key!r} is a view into an input; .clone() it")
        if 0 in value.stride() and value.numel() > 1:
            raise CheckFailed(f"tensor {key!r} is expanded from fewer numbers; .clone() it")
        tied[place] = key


@check
def architectures(case: DefenseCase) -> str:
    """It runs on every tiny architecture, or refuses one by a MethodError that says why."""
    said = []
    for architecture in ARCHITECTURES:
        try:
            _compatible(case.released(architecture), Tiny(architecture).base())
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
def equivalence(case: DefenseCase) -> str:
    """If its card says exact, users get the expert's logits (1e-4 of the largest, float32)."""
    found = {}
    for architecture in ARCHITECTURES:
        try:
            case.released(architecture)
        except Exception:
            continue  # a refusal, or the failure that `architectures` tells
        shipped = case.shipped(architecture)
        reference = expert(Tiny(architecture), "first")
        gap = relative_gap(logits(architecture, shipped), logits(architecture, reference))
        if case.method.card.exact and not gap <= EXACT:
            raise CheckFailed(
                f"card.exact, but logits move by {gap:.1e} of the largest on {architecture}"
            )
        found[architecture] = (
            f"{architecture} {gap:.1e}"
            if case.method.card.exact
            else f"{architecture} {accuracy(architecture, reference):.2f} → "
            f"{accuracy(architecture, shipped):.2f}"
        )
    if not found:
        raise CheckFailed("no release to compare")
    what = "|Δlogit|" if case.method.card.exact else "not exact by its card; accuracy"
    return f"{what}: {', '.join(found.values())}"


@check
def shipped(case: DefenseCase) -> str | None:
    """What users run gives finite features, and the same ones when it is made again."""
    architecture = case.testbed.architecture
    model = case.shipped(architecture)
    foreign = isinstance(model, ForeignState)
    if case.method.changes_modules and not foreign:
        raise CheckFailed("shipped must return a ForeignState(tensors, forward)")
    run = model.forward if isinstance(model, ForeignState) else case.testbed.features
    task = case.testbed.task("first")
    with torch.no_grad():
        features = run(model, task.test.inputs)
        again = run(case.shipped(architecture), task.test.inputs)
    if features.shape != (len(task.test), task.head.shape[1]):
        raise CheckFailed(f"forward gives features of shape {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise CheckFailed("the shipped model gives NaN or infinite features")
    if not torch.equal(features, again):
        raise CheckFailed("shipped gives another model when called again with the same rng")
    return "changes modules" if foreign else None


@check
def notes(case: DefenseCase) -> str | None:
    """What it reports by victim.note is JSON under names of the form method.what."""
    heard: dict[str, object] = {}
    case.protect(dataclasses.replace(victim(case.testbed), note=heard.__setitem__))
    for key, value in heard.items():
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
            raise CheckFailed(f'note {key!r}: write "method.what"')
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckFailed(f"note {key!r} is no JSON: {error}") from None
    return ", ".join(heard) or None


@check
def bfloat16(case: DefenseCase) -> str | None:
    """From bfloat16 weights it makes a bfloat16 release, or refuses by a MethodError."""
    owner = victim(case.testbed, dtype=torch.bfloat16)
    try:
        release = case.protect(owner)
    except REFUSALS as refusal:
        return f"refuses: {refusal}"
    _compatible(release, owner.base)
    return None


@check
def device(case: DefenseCase) -> str:
    """On another device it makes the release it makes on the CPU (training: a finite one)."""
    other = other_device()
    if other is None:
        raise SkipTest("no CUDA device on this machine")
    release = case.on_device(other)
    _compatible(release, case.testbed.base())
    if case.method.card.trains:
        return f"{other.type}: runs (training there is not compared)"
    return f"{other.type}: {_near(release, case.release, ROUNDING, str(other))}"


@check
def pickles(case: DefenseCase) -> None:
    """It survives pickling, and the copy makes the same release."""
    _copied(case, pickle.loads(pickle.dumps(case.method)))


@check
def deep_copies(case: DefenseCase) -> None:
    """It survives copy.deepcopy, and the copy makes the same release."""
    _copied(case, copy.deepcopy(case.method))


@check
def threads(case: DefenseCase) -> str:
    """The number of CPU threads changes the release by rounding at most."""
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append(case.protect())
    limit = ROUNDING_TRAINED if case.method.card.trains else ROUNDING
    return _near(made[1], made[0], limit, "two threads")


@check
def settings(case: DefenseCase) -> None:
    """Grad mode, threads, default dtype and device, environment and folder stay as they were."""
    owner = victim(case.testbed)
    before = guards.settings()
    case.protect(owner)
    settings_kept(before, "protect")


@check
def cost(case: DefenseCase) -> str:
    """Time and peak memory (tensors that torch operations return); nothing is kept afterwards."""
    owner = victim(case.testbed)
    start = time.perf_counter()
    case.protect(owner)
    seconds = time.perf_counter() - start
    size = sum(v.numel() * v.element_size() for v in owner.base.values())
    millions = sum(v.numel() for v in owner.base.values()) / 1e6
    held = weakref.ref(next(iter(owner.expert.values())).untyped_storage())
    with Watch() as watch:
        release = case.protect(owner)
    del release, owner
    if held() is not None or watch.live > KEPT * size:
        gc.collect()  # slow, and only cycles need it
    if held() is not None:
        raise CheckFailed("keeps the victim's tensors in memory after the call")
    if watch.live > KEPT * size:
        raise CheckFailed(f"keeps {watch.live / size:.1f}× the model in memory after the call")
    return (
        f"{seconds:.3f} s for {millions:.3f} M parameters, {seconds / millions:.2f} s per million; "
        f"peak memory {watch.peak / 2**20:.2f} MiB ({watch.peak / size:.1f}× the model)"
    )


def other_device() -> torch.device | None:
    """A device besides the CPU on which methods can run (in float64, so no mps)."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def _compatible(release: State, base: State) -> None:
    try:
        compatible(release, base, "the release")
    except CheckpointError as error:
        raise CheckFailed(str(error)) from None


def _equal(release: State, reference: State, what: str) -> None:
    for key, value in reference.items():
        if digest({key: release[key]}) != digest({key: value}):
            raise CheckFailed(f"{what} gives another tensor {key!r}")


def _copied(case: DefenseCase, again: Defense) -> None:
    if again != case.method:
        raise CheckFailed("the copy does not equal the original")
    _equal(case.protect(method=again), case.release, "the copy")


def _near(release: State, reference: State, limit: float, what: str) -> str:
    """Fail if a tensor is off by more than ``limit`` of its norm; else say by how much."""
    worst = 0.0
    for key, value in reference.items():
        one, other = release[key].detach().double(), value.detach().double()
        off = float((one - other).norm() / other.norm())
        if not off <= limit:
            raise CheckFailed(f"{what}: tensor {key!r} is off by {off:.1e} of its norm")
        worst = max(worst, off)
    return f"tensors differ by {worst:.0e} at most" if worst else "bit for bit"


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
