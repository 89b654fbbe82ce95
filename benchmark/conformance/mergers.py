"""The checks of a merger: those of any method, what it knows and spends, and how it is searched."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from benchmark.api.contracts import Setting
from benchmark.conformance import behaviour, definition, honesty, tiers
from benchmark.conformance.behaviour import ROUNDING, equal, fit, near
from benchmark.conformance.case import REFUSALS
from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.conformance.merges import MergeCase, Merging, words
from benchmark.conformance.subjects import accuracy, expert, logits
from benchmark.conformance.testbed import Tiny
from benchmark.core.state import State, with_variances
from benchmark.evaluation.accuracy import relative_gap

#: ‖ΔW‖ / ‖W‖ of one merge computed in two ways.
SAME = 1e-5

check: Checks[MergeCase] = Checks("merger")
check.include(definition.check)
check.include(behaviour.check)
check.include(honesty.check)
check.include(tiers.check)


@check
def search_space(case: MergeCase) -> str:
    """For two members (and three, or it refuses) settings, each once, of which some merge all."""
    said = []
    for members in (2, 3):
        try:
            found = case.method.search_space(members)
        except REFUSALS as refusal:
            said.append(f"refuses three: {refusal}")
            continue
        _settings(found, members)
        if case.method.search_space(members) != found:
            raise CheckFailed(f"the search space for {members} members differs between two calls")
        said.append(f"{len(found)} for {members} members")
    return f"settings: {', '.join(said)}"


@check
def left_out(case: MergeCase) -> str | None:
    """A member at coefficient 0 has no influence, as if it were not there at all."""
    setting = _without_last(case.tried()[-1])
    inputs = case.scene()
    try:
        merged = case.merged(inputs, setting)
    except REFUSALS as refusal:
        return f"refuses: {refusal}"
    other = replace(inputs, experts=(inputs.experts[0], _far(inputs.experts[1])))
    expected = case.named(merged, setting)
    what = "another expert at coefficient 0"
    near(case.named(case.merged(other, setting), setting), expected, SAME, what)
    if case.knows or case.method.stochastic:
        return None  # draws and data belong to the places of members
    alone = replace(inputs, experts=inputs.experts[:1])
    single = replace(setting, coefficients=setting.coefficients[:1])
    try:
        found = case.merged(alone, single)
    except REFUSALS as refusal:
        return f"refuses one member: {refusal}"
    what = "one member alone, instead of another at 0,"
    return near(case.named(found, setting), expected, SAME, what)


@check
def order_of_settings(case: MergeCase) -> None:
    """Settings give the same merge in whatever order they are tried, and as ``merge`` does."""
    inputs, settings = case.scene(), case.tried()
    merge = case.prepared(inputs, torch.Generator().manual_seed(0))
    for setting in [*reversed(settings), settings[-1]]:
        found = case.named(merge(setting), setting)
        equal(found, {name: case.result[name] for name in found}, "another order of settings")
    setting, inputs = next(s for s in settings if not s.layers), case.scene()
    rng = torch.Generator().manual_seed(0)
    merged = case.method.merge(inputs.base, inputs.experts, setting, case.told(inputs), rng)
    found = case.named(merged, setting)
    equal(found, {name: case.result[name] for name in found}, "merge, unlike prepare,")


@check
def stochastic(case: MergeCase) -> str | None:
    """A merge without data that depends on the seed says ``stochastic``; else seeds share it."""
    if case.knows:
        return "is told the task or has data: one result per seed anyway"
    if case.method.stochastic:
        return None
    try:
        equal(case.run(seed=1), case.result, "another seed")
    except CheckFailed as failed:
        raise CheckFailed(f"{failed}; declare stochastic: ClassVar[bool] = True") from None
    return None


@check
def no_task_vectors(case: MergeCase) -> str | None:
    """Where no member differs from the base the merge computes the base, or it is refused."""
    inputs = case.scene()
    inputs = replace(inputs, experts=tuple(dict(inputs.base) for _ in inputs.experts))
    architecture = case.testbed.architecture
    for setting in case.tried():
        try:
            merged = case.merged(inputs, setting)
        except REFUSALS as refusal:
            return f"refuses: {refusal}"
        for task in inputs.tasks:
            gap = relative_gap(*(logits(architecture, s, task) for s in (merged, inputs.base)))
            if not gap <= ROUNDING:
                raise CheckFailed(
                    f"at {words(setting)} its logits on {task} are {gap:.1e} of the largest away "
                    "from the base's"
                )
    return None


@check
def members(case: MergeCase) -> str:
    """It merges three members as it does two, or its search space refuses them."""
    try:
        setting = case.tried(3)[-1]
    except REFUSALS as refusal:
        return f"refuses: {refusal}"
    inputs = case.scene(members=("first", "second", "third"))
    merged = case.merged(inputs, setting)
    fit(case.named(merged, setting), inputs.base)
    return _skills(case, inputs, [merged])


@check
def convolutions(case: MergeCase) -> str | None:
    """On a ResNet, with running statistics and counters, the merge fits too, or it is refused."""
    inputs, setting = case.scene(Tiny("resnet")), case.tried()[0]
    try:
        merged = case.merged(inputs, setting)
    except REFUSALS as refusal:
        return f"refuses: {refusal}"
    fit(case.named(with_variances(merged), setting), inputs.base)
    return None


@check
def skill(case: MergeCase) -> str:
    """The merge runs on every member's task; how well, it tells."""
    inputs = case.scene()
    merge = case.prepared(inputs, torch.Generator().manual_seed(0))
    return _skills(case, inputs, [merge(setting) for setting in case.tried()])


def _settings(found: object, members: int) -> None:
    if not isinstance(found, list) or not found:
        raise CheckFailed(f"the search space for {members} members is no list with settings")
    for setting in found:
        if not isinstance(setting, Setting) or len(setting.coefficients) != members:
            raise CheckFailed(f"setting {setting} has not one coefficient for each of {members}")
        if not all(map(math.isfinite, (*setting.coefficients, *setting.parameters.values()))):
            raise CheckFailed(f"setting {setting} is not finite")
        if not any(setting.coefficients):
            raise CheckFailed(f"setting {setting} leaves everybody out: it is the base")
    for one, other in itertools.combinations(found, 2):
        if one == other:
            raise CheckFailed(f"the search space holds {words(one)} twice")
    if not any(all(setting.coefficients) for setting in found):
        raise CheckFailed("no setting of the search space merges all members")


def _without_last(setting: Setting) -> Setting:
    return Setting((*setting.coefficients[:-1], 0.0), setting.parameters)


def _far(state: State) -> State:
    """Another expert: the same one with its weights turned round and doubled."""
    return {
        key: 2 * value.flip(0) if value.is_floating_point() and value.ndim else value
        for key, value in state.items()
    }


def _skills(case: MergeCase, inputs: Merging, merged: list[State]) -> str:
    """Accuracy per task: of the base, of the best of some merges, of the expert."""
    said = []
    for task in inputs.tasks:
        states = [inputs.base, *merged, expert(case.testbed, task)]
        base, *ours, theirs = (accuracy(case.testbed.architecture, s, task) for s in states)
        said.append(f"{task}: {base:.2f} → {max(ours):.2f}, expert {theirs:.2f}")
    return "; ".join(said)
