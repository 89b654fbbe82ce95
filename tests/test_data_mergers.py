"""Mergers with data: their arithmetic by independent means, what they may not do, what they pay."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mergers import generator
from torch import Tensor
from zoo import perturbed, state_of, tiny

from benchmark.anatomy import Anatomy
from benchmark.api import methods
from benchmark.api.contracts import Access, Knowledge, Setting
from benchmark.api.methods import merger
from benchmark.core.data import Split, Task
from benchmark.core.errors import AccessError, MethodError, UsageError
from benchmark.core.state import State, compatible, digest, task_vector
from benchmark.io.assets import AssetError
from benchmark.merging.adamerging import AdaMerging
from benchmark.merging.fisher import Fisher
from benchmark.merging.neulig import NeuLig
from benchmark.merging.prodistill import ProDistill
from benchmark.merging.regmean import RegMean
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load

SPECS = (
    "fisher(per_task=3)",
    "fisher(per_task=3, labels=sampled)",
    "regmean(per_task=8)",
    "adamerging(steps=3)",
    "adamerging(steps=3, layerwise=false)",
    "neulig(steps=3)",
    "prodistill(steps=3, per_task=6)",
)
FAMILIES = ("bert", "vit", "gpt2", "t5", "llama", "open-clip")
FLOPS = 10.0
ROWS = 24


# --- tiny transformers with three tasks -----------------------------------------------------------


def features(name: str, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """Differentiable unit vectors (n, 16), from all that the model computes."""
    found = torch.func.functional_call(
        tiny(name)[0], dict(state), kwargs=dict(inputs), tie_weights=False
    )
    values = found.values() if isinstance(found, Mapping) else found
    values = (
        values if isinstance(values, (tuple, list)) or not isinstance(values, Tensor) else [values]
    )
    n = len(next(iter(inputs.values())))
    flat = next(v.reshape(n, -1) for v in values if isinstance(v, Tensor) and len(v) == n)
    mix = torch.randn(flat.shape[1], 16, generator=generator(9)) / flat.shape[1] ** 0.5
    return torch.nn.functional.normalize(flat.float() @ mix, dim=-1)


@functools.cache
def tasks(name: str) -> dict[str, Task]:
    made, shown = {}, tiny(name)[1]
    for number, task in enumerate(("one", "two", "three")):
        rng = generator(20 + number)
        inputs = {}
        for key, value in shown.items():
            rows = torch.randint(len(value), (ROWS,), generator=rng)
            noise = torch.randn(value[rows].shape, generator=rng)
            inputs[key] = value[rows] + noise if value.is_floating_point() else value[rows]
        if "input_ids" in inputs:
            inputs["input_ids"] = torch.randint(4, 40, inputs["input_ids"].shape, generator=rng)
        split = Split(inputs, torch.arange(ROWS) % 3)
        head = torch.nn.functional.normalize(torch.randn(3, 16, generator=rng), dim=-1)
        made[task] = Task(task, ("a", "b", "c"), split, split, split, head, 5.0)
    return made


def known(name: str = "bert", access: Access = Access.LABELED, count: int = 2) -> Knowledge:
    model = tiny(name)[0]
    return Knowledge(
        access, state_of(model), (), Anatomy.of(model), module=model, flops_per_example=FLOPS,
        tasks=dict(list(tasks(name).items())[:count]), features=functools.partial(features, name),
    )  # fmt: skip


def experts(name: str = "bert", count: int = 2, size: float = 0.1) -> list[State]:
    base = state_of(tiny(name)[0])
    return [perturbed(base, size, seed) for seed in range(1, count + 1)]


def merged(spec: str, name: str, members: list[State], coefficients: tuple[float, ...]) -> State:
    told = known(name, count=len(members))
    base = state_of(tiny(name)[0])
    found = merger(spec).method.merge(base, members, Setting(coefficients), told, generator())
    compatible(found, base, spec)
    return found


# --- what holds for all of them -------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_no_input_is_touched_and_draws_repeat(spec: str) -> None:
    base, members, told = state_of(tiny("bert")[0]), experts(), known()
    before = [digest(state) for state in (base, *members)]
    method = merger(spec).method
    built = method.prepare(base, members, told, generator())
    settings = method.search_space(2)
    first = [digest(built(setting)) for setting in settings]
    assert [digest(state) for state in (base, *members)] == before
    # The same again, in another order, by another call.
    again = method.prepare(base, members, known(), generator())
    assert [digest(again(setting)) for setting in reversed(settings)] == first[::-1]
    other = method.prepare(base, members, known(), generator(1))
    assert digest(other(settings[0])) != first[0]
    assert all(value.requires_grad is False for value in built(settings[0]).values())


@pytest.mark.parametrize("spec", SPECS)
def test_what_it_used_is_charged(spec: str) -> None:
    told = known()
    method = merger(spec).method
    method.prepare(told.base, experts(), told, generator())(method.search_space(2)[0])
    held = getattr(method, "per_task", None)
    assert told.budget.examples == 2 * (min(held, ROWS) if held else ROWS)
    # Every example ran through its expert, at the least.
    assert told.budget.flops >= FLOPS * told.budget.examples
    trained = getattr(method, "steps", 0)
    assert told.budget.steps == trained * (2 if spec.startswith("prodistill") else 1)


def test_a_backward_pass_costs_two_forward_passes() -> None:
    told = known()
    AdaMerging(steps=4, batch_size=5).prepare(told.base, experts(), told, generator())(
        Setting((1.0, 1.0))
    )
    assert told.budget.flops == 4 * 2 * 5 * 3 * FLOPS
    told = known()
    Fisher(per_task=2).prepare(told.base, experts(), told, generator())
    assert told.budget.flops == 2 * 2 * (1 + 3 * 2) * FLOPS  # three classes


@pytest.mark.parametrize("spec", SPECS)
def test_a_member_at_0_is_left_out(spec: str) -> None:
    members = experts(count=3, size=0.05)
    one = merged(spec, "bert", members, (0.0, 1.0, 1.0))
    # Whatever the one left out is, the result is the same.
    strange = [perturbed(members[0], 3.0, 7), *members[1:]]
    assert digest(merged(spec, "bert", strange, (0.0, 1.0, 1.0))) == digest(one)
    assert digest(merged(spec, "bert", strange, (1.0, 1.0, 1.0))) != digest(one)


@pytest.mark.parametrize("spec", SPECS)
def test_without_its_data_it_says_so(spec: str) -> None:
    base, members = state_of(tiny("bert")[0]), experts()
    method = merger(spec).method
    setting = method.search_space(2)[0]
    with pytest.raises(MethodError, match="needs data of every member's task"):
        method.merge(base, members, setting, None, generator())
    with pytest.raises(MethodError, match="2 models to merge but data of 3 tasks"):
        method.merge(base, members, setting, known(count=3), generator())
    with pytest.raises(AccessError):
        method.merge(base, members, setting, known(access=Access.WEIGHTS), generator())
    if method.access == Access.LABELED:
        with pytest.raises(AccessError, match="labelled"):
            method.merge(base, members, setting, known(access=Access.UNLABELED), generator())
    else:  # labels are never looked at
        method.merge(base, members, setting, known(access=Access.UNLABELED), generator())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_merges(spec: str, name: str) -> None:
    base = state_of(tiny(name)[0])
    found = merged(spec, name, experts(name), (0.5, 0.5))
    assert task_vector(found, base)
    # Nobody moved: nothing to merge.
    assert not task_vector(merged(spec, name, [base, dict(base)], (0.5, 0.5)), base)


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_stays_half(spec: str) -> None:
    base, members = state_of(tiny("bert")[0]), experts()

    def halved(state: State) -> State:
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}

    told = known()
    told.base = halved(base)
    found = merger(spec).method.merge(
        halved(base), [halved(m) for m in members], Setting((0.5, 0.5)), told, generator()
    )
    compatible(found, halved(base), spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("fisher(per_task=0)", "per_task"),
        ("fisher(shares=(0.5, 1))", "shares"),
        ("fisher(labels=true_ones)", "labels"),
        ("regmean(alpha=1.1)", "alpha"),
        ("regmean(ridge=0)", "ridge"),
        ("adamerging(start=2)", "start"),
        ("adamerging(steps=0)", "steps"),
        ("neulig(hidden=0)", "hidden"),
        ("prodistill(rate=0)", "rate"),
    ],
)
def test_values_out_of_range_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        merger(spec)


def test_what_is_searched() -> None:
    assert {sum(s.coefficients) for s in Fisher().search_space(2)} == {1.0}
    tried = [s.coefficients for s in Fisher(shares=(0.5,)).search_space(3)]
    np.testing.assert_allclose(tried, [(0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.25, 0.25)])
    assert [s.parameters["alpha"] for s in RegMean().search_space(2)] == [0.1, 0.5, 0.9, 1.0]
    assert [s.parameters["alpha"] for s in RegMean(alpha=0.5).search_space(2)] == [0.5]
    for method in (AdaMerging(), NeuLig(), ProDistill()):
        assert [s.coefficients for s in method.search_space(2)] == [(1.0, 1.0)]
        assert [s.coefficients for s in method.search_space(3)] == [(1.0,) * 3, (0.0, 1.0, 1.0)]


# --- through the pipeline -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_what_the_free_rider_knew_and_used(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    mergers = (
        "average", "fisher(per_task=4)", "regmean(per_task=16)", "adamerging(steps=5)",
        "neulig(per_class=2)", "prodistill(per_task=8, steps=4)",
    )  # fmt: skip
    suite = Suite.model_validate(
        load("smoke").model_dump()
        | {
            "defenses": ("none",),
            "attacks": ("none",),
            "mergers": mergers,
            "test": 100,
            "validation_rungs": (8, 16),
            "fixed_coefficients": (),
        }
    )
    try:
        cells = running.execute(
            planning.make(suite, torch.device("cpu")), tmp_path / "run", torch.device("cpu")
        )
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    tiers = {"average": "weights", "neulig(per_class=2)": "labeled"}
    assert {cell.merger for cell in cells} == set(mergers)
    for cell in cells:
        assert cell.status == "ok", cell.reason
        assert cell.access == tiers.get(cell.merger, "unlabeled")
        assert (cell.budget.examples > 0) == (cell.merger != "average")
        assert (cell.budget.flops > 0) == (cell.merger != "average")


def test_they_are_registered_with_their_papers() -> None:
    papers = {
        "fisher": "2111.09832", "regmean": "2212.09849", "adamerging": "2310.02575",
        "neulig": "2503.01268", "prodistill": "2502.12706",
    }  # fmt: skip
    for name, arxiv in papers.items():
        method = methods.merger(name).method
        assert method.card.arxiv == arxiv
        assert method.access > Access.WEIGHTS
        assert not method.task_aware
