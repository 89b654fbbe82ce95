"""Attacks that learn on unlabelled inputs what to merge: what they lower, keep, are charged."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from plane import PLANE, TASKS, tuned
from test_attacks import distance, lock
from test_data_attacks import FLOPS, plane
from test_trained_on_digits import VICTIM, bench
from torch import Tensor
from zoo import TOLERANCE, generator

from attacks.learned_match import LearnedMatch
from attacks.trap_smooth import TrapSmooth
from benchmark.anatomy import Anatomy, gauges
from benchmark.anatomy.gauges import Element, Group
from benchmark.api.contracts import Access, Attack, Knowledge
from benchmark.api.methods import attack, defense
from benchmark.conformance.scenes import Scene, scene
from benchmark.conformance.testbed import Tiny
from benchmark.core.errors import AccessError, UsageError
from benchmark.core.state import ForeignState, State, digest, norm, task_vector
from benchmark.learn.lessons import Lessons
from benchmark.learn.training import fine_tune
from benchmark.merging.informed import mixture
from benchmark.pipeline.suite import Group as Members
from defenses.trap2 import TrapLoss

LEARNED: list[Attack] = [TrapSmooth(steps=3), LearnedMatch(steps=3)]


def barrier(state: State, known: Knowledge, teacher: State | None = None) -> float:
    """What mixtures answer otherwise than their members, over a box of coefficients."""
    lessons = Lessons(teacher or state, known, 60, 60, generator(9))
    taus = [task_vector(model, known.base) for model in (state, *known.partners)]
    corners = torch.cartesian_prod(*[torch.tensor([0.3, 0.7, 1.1])] * len(taus))
    with torch.no_grad():
        losses = [lessons.loss(mixture(known.base, taus, shares)) for shares in corners]
    return float(torch.stack(losses).mean())


# --- what is taught -------------------------------------------------------------------------------


def test_lessons_are_the_answers_of_each_task_s_own_model() -> None:
    own, released, other = plane(Access.UNLABELED), tuned(), tuned(seed=5)
    lessons = Lessons(released, own, 100, 100, generator(0))
    assert (own.budget.examples, own.budget.steps) == (200, 0)
    assert own.budget.flops == 200 * FLOPS
    state = {**other, "weight": other["weight"].clone().requires_grad_()}
    loss = lessons.loss(state)
    assert own.budget.steps == 1
    assert own.budget.flops == 200 * FLOPS * (1 + 3)

    def log_p(state: State, name: str) -> Tensor:
        task = TASKS[name]
        return (task.scale * PLANE.features(state, task.train.inputs) @ task.head.T).log_softmax(1)

    total = torch.zeros(())
    for name, owner in (("signs", released), ("order", own.partners[0])):
        a, b = log_p(owner, name), log_p(state, name)
        total = total + (a.exp() * (a - b)).sum(1).mean()
    torch.testing.assert_close(loss, total)
    loss.backward()
    assert state["weight"].grad is not None
    # A release that mergers cannot read answers as its users run it.
    shipped = plane(Access.UNLABELED, ForeignState(released, PLANE.features))
    blind = Lessons(PLANE.base(), shipped, 100, 100, generator(0))
    torch.testing.assert_close(blind.loss(state), total)


def test_a_mixture_is_linear_in_everything() -> None:
    base, first, second = PLANE.base(), tuned(), tuned("order")
    taus = [task_vector(state, base) for state in (first, second)]
    found = mixture(base, taus, torch.tensor([0.5, 2.0]))
    wanted = base["weight"] + 0.5 * taus[0]["weight"] + 2 * taus[1]["weight"]
    torch.testing.assert_close(found["weight"], wanted)
    assert all(found[key] is base[key] for key in base if key != "weight")


# --- trap-smooth ----------------------------------------------------------------------------------


@functools.cache
def trapped() -> State:
    base, examples = PLANE.base(), {"signs": TASKS["signs"].train}
    return fine_tune(PLANE, TASKS, base, examples, generator(0), loss=TrapLoss(base, 0.5, cap=5.0))


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_trap_smooth_lowers_the_loss_of_all_mixtures(start: float) -> None:
    released, own = trapped(), plane(Access.UNLABELED)
    before = digest(released)
    found = TrapSmooth(per_task=60, rate=1.0, start=start).recover(released, own, generator(0))
    assert (own.budget.examples, own.budget.steps) == (120, 80)
    assert own.budget.flops >= 80 * 2 * 32 * FLOPS * 3
    assert digest(released) == before
    assert barrier(found, own, released) < 0.5 * barrier(released, own)
    # Nothing but what a member moved.
    assert task_vector(found, PLANE.base()).keys() == {"weight"}


def test_trap_smooth_stays_near_the_release_if_anchored() -> None:
    released = trapped()
    gaps = [
        norm(task_vector(found, released))
        for anchor in (0.0, 1.0, 100.0)
        for found in [
            TrapSmooth(anchor=anchor, rate=0.3).recover(
                released, plane(Access.UNLABELED), generator(0)
            )
        ]
    ]
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_trap_smooth_runs_on_the_base_as_its_control() -> None:
    base = PLANE.base()
    copied = {key: value.clone() for key, value in base.items()}
    for released in (base, copied):
        found = TrapSmooth(steps=5).recover(released, plane(Access.UNLABELED), generator(0))
        assert task_vector(found, base).keys() == {"weight"}, "what only the partner moved"
    alone = plane(Access.UNLABELED)
    alone.partners = (base,)
    assert digest(TrapSmooth(steps=5).recover(base, alone, generator(0))) == digest(base)


# --- learned-match --------------------------------------------------------------------------------

FAMILIES = ("vit", "bert", "gpt2", "qwen2", "qwen3", "convnext", "resnet")


@functools.cache
def group(name: str) -> tuple[State, Group]:
    model, _ = zoo.tiny(name)
    base = zoo.state_of(model)
    return base, gauges.of(Anatomy.of(model), base).exact


@pytest.mark.parametrize("name", FAMILIES)
def test_coordinates_of_gauges(name: str) -> None:
    model, inputs = zoo.tiny(name)
    base, found = group(name)
    smooth = found.smooth
    assert smooth.gauges
    drawn = smooth.draw(generator(1))
    zeros: list[Element] = [tuple(torch.zeros_like(x) for x in element) for element in drawn]

    def at(coordinates: list[Element]) -> State:
        elements = [g.at(x) for g, x in zip(smooth.gauges, coordinates, strict=True)]
        return smooth.apply(base, elements)

    for key, value in at(zeros).items():
        torch.testing.assert_close(value, base[key], rtol=1e-6, atol=1e-7)
    some: list[Element] = [
        tuple(0.2 * torch.randn(x.shape, generator=generator(2), dtype=x.dtype) for x in element)
        for element in drawn
    ]
    elsewhere = at(some)
    assert norm(task_vector(elsewhere, base)) > 0.01 * norm(base_floats(base))
    assert zoo.drift(model, base, elsewhere, inputs) <= TOLERANCE
    # Gradients reach every coordinate at the start.
    held = [tuple(x.requires_grad_() for x in element) for element in zeros]
    state = at(held)
    moved = [v.double().square().sum() for v in state.values() if v.requires_grad]
    torch.stack(moved).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for e in held for x in e)
    for gauge in found.gauges:
        if not gauge.smooth:
            with pytest.raises(UsageError, match="has no coordinates"):
                gauge.at(())


def base_floats(state: State) -> State:
    return {key: value for key, value in state.items() if value.is_floating_point()}


def seen(architecture: Any, **options: Any) -> Scene:
    return scene(Tiny(architecture), Access.UNLABELED, **options)


@pytest.mark.parametrize("architecture", ["vit", "bert", "llama"])
def test_learned_match_keeps_the_function_and_lowers_the_barrier(architecture: Any) -> None:
    inputs = seen(architecture, lock=False)
    own, released = inputs.knowledge, inputs.released
    method = LearnedMatch(steps=30, weight=0.0)
    found = method.recover(released, own, generator(0))
    assert own.budget.steps == 30
    testbed = Tiny(architecture)
    for task in inputs.tasks.values():
        before, after = (testbed.features(s, task.test.inputs) for s in (released, found))
        assert float((before - after).abs().max()) <= TOLERANCE
    assert norm(task_vector(found, released)) > 0
    plain = LearnedMatch(steps=1, rate=1e-9).recover(released, own, generator(0))
    assert barrier(found, own) < barrier(plain, own)


def test_learned_match_sees_through_a_lock() -> None:
    inputs = seen("vit", lock=False)
    own, expert, anatomy = inputs.knowledge, inputs.released, Tiny("vit").anatomy()
    method = LearnedMatch(steps=3)
    plain, unlocked = (
        method.recover(state, own, generator(0))
        for state in (expert, lock(expert, anatomy, "general", heads=True))
    )
    assert distance(unlocked, plain, own.base, expert) < 0.02
    far = lock(expert, anatomy, "general")
    blind = LearnedMatch(steps=3, align=False).recover(far, own, generator(0))
    assert distance(blind, far, own.base, expert) < distance(blind, expert, own.base, expert)


def test_learned_match_has_nothing_to_do_without_gauges() -> None:
    inputs = seen("vit")
    found = LearnedMatch(kinds=("layer-scale",)).recover(
        inputs.released, inputs.knowledge, generator(0)
    )
    assert inputs.knowledge.budget.steps == 0
    aligned = gauges.of(Tiny("vit").anatomy(), inputs.knowledge.base).exact.align(
        inputs.released, inputs.knowledge.base
    )
    assert digest(found) == digest(aligned)


# --- on real data, tiers and parameters -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["trap-smooth", "learned-match(weight=0.0)"])
def test_a_trap_has_no_teeth_left(spec: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    digits, partner = bench(home / "trained"), "digits-high"
    trap = digits.released(defense("trap2(weight=0.405, steps=3)"), VICTIM, 0).state()
    base, expert = digits.base.state(), digits.expert(VICTIM).state()
    named = attack(spec)
    known = digits.knowledge(named, Members(victim=VICTIM, partners=(partner,)))
    taken = task_vector(known.partners[0], base)

    def at(model: State, share: float) -> float:
        taus = [task_vector(model, base), taken]
        state = mixture(base, taus, torch.tensor([share, share]))
        return float(digits.evaluator.correct(state, VICTIM, "test", range(500)).mean())

    recovered = named.method.recover(trap, known, generator(0))
    assert at(trap, 0.8) < at(expert, 0.8) - 0.1
    assert at(recovered, 0.8) > at(expert, 0.8) - 0.05
    harmless = named.method.recover(expert, known, generator(0))
    assert at(harmless, 0.8) > at(expert, 0.8) - 0.02


@pytest.mark.parametrize("method", LEARNED, ids=lambda method: type(method).__name__)
def test_a_lower_tier_is_refused(method: Attack) -> None:
    inputs = scene(Tiny("vit"), Access.WEIGHTS)
    with pytest.raises(AccessError, match="only 'weights' given"):
        method.recover(inputs.released, inputs.knowledge, generator(0))
    assert inputs.knowledge.budget.examples == 0


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TrapSmooth, {"steps": 0}), (TrapSmooth, {"rate": 0.0}), (TrapSmooth, {"anchor": -1.0}),
        (TrapSmooth, {"start": -1.0}), (TrapSmooth, {"low": 2.0}), (LearnedMatch, {"per_task": 0}),
        (LearnedMatch, {"weight": -1.0}), (LearnedMatch, {"high": 0.1}),
        (LearnedMatch, {"kinds": ("query",)}),
    ],
)  # fmt: skip
def test_parameters_out_of_range(cls: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        cls(**values)
