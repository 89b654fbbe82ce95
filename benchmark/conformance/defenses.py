"""The checks of a defense: those of any method, and what its users get."""

from __future__ import annotations

import dataclasses
import json
import re

import torch

from benchmark.conformance import behaviour, definition, foreign, honesty
from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.conformance.subjects import DefenseCase, accuracy, expert, logits, victim
from benchmark.conformance.testbed import Tiny, Watched
from benchmark.core.errors import AccessError
from benchmark.core.state import ForeignState
from benchmark.evaluation.accuracy import relative_gap

#: METHODS section 1: max |Δlogit| relative to the largest logit, float32.
EXACT = 1e-4

check: Checks[DefenseCase] = Checks("defense")
check.include(definition.check)
check.include(behaviour.check)
check.include(honesty.check)


@check
def equivalence(case: DefenseCase) -> str:
    """If its card says exact, users get the expert's logits (1e-4 of the largest, float32)."""
    found = {}
    for architecture in case.accepted():
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


@check.binding
def no_test_data(case: DefenseCase) -> None:
    """It asks for no test example, not of the testbed behind what it is given either."""
    testbed = Watched(case.testbed.architecture)
    inputs, rng = case.inputs(testbed), torch.Generator().manual_seed(0)
    testbed.asked.clear()
    try:
        case.exercise(inputs, rng)
    except AccessError as error:
        raise CheckFailed(f"asks for what its owner has not: {error}") from None
    if testbed.asked:
        raise CheckFailed(
            f"takes the task {testbed.asked[0]!r} from the testbed, test split and all"
        )


@check
def notes(case: DefenseCase) -> str | None:
    """What it reports by victim.note is JSON under names of the form method.what."""
    heard: dict[str, object] = {}
    case.run(dataclasses.replace(victim(case.testbed), note=heard.__setitem__))
    for key, value in heard.items():
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
            raise CheckFailed(f'note {key!r}: write "method.what"')
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckFailed(f"note {key!r} is no JSON: {error}") from None
    return ", ".join(heard) or None


check.include(foreign.check)
