"""Mergers on a track of their own: they know the task, or keep every member."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from plane import TASKS
from test_mergers import assert_equal, generator, members
from torch import Tensor
from zoo import invertible, outputs, perturbed, state_of, tiny

from benchmark.anatomy import Anatomy, apply_vo, taps
from benchmark.api import methods
from benchmark.api.contracts import Access, Knowledge, Setting
from benchmark.api.methods import merger
from benchmark.core.errors import AccessError, CheckpointError, MethodError
from benchmark.core.state import ForeignState, PerTask, State, digest, forward_of, merged_well
from benchmark.io.assets import AssetError
from benchmark.merging.smile import _Router, _units
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load

MERGERS = ("emr", "smile", "smile(route=linear)", "ensemble")
ARCHITECTURES = ("bert", "vit", "gpt2", "llama", "gpt-neox", "phi3")


def run(name: str, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    return outputs(tiny(name)[0], state, dict(inputs))


def known(name: str, task_id: bool = True) -> Knowledge:
    """What the pipeline tells a task-aware merger of two models."""
    model = tiny(name)[0]
    return Knowledge(
        Access.WEIGHTS, state_of(model), (), Anatomy.of(model), tasks=TASKS, task_id=task_id,
        module=model, features=functools.partial(run, name),
    )  # fmt: skip


def moved(name: str, seed: int, biases: bool = True) -> State:
    """An expert whose blocks moved, and nothing else."""
    model = tiny(name)[0]
    base, anatomy = state_of(model), Anatomy.of(model)
    linears = [lin for block in anatomy.attention for lin in block.linears().values()]
    linears += [lin for block in anatomy.mlp for lin in (block.up, block.gate, block.down) if lin]
    keys = {slot.key for linear in linears for slot in linear.slots()}
    return {**base, **{k: v for k, v in perturbed(base, 0.3, seed).items() if k in keys}}


def merged(spec: str, name: str, experts: list[State], weights: tuple[float, ...]) -> State:
    base = state_of(tiny(name)[0])
    return merger(spec).method.merge(base, experts, Setting(weights), known(name), generator())


def answers(name: str, state: State) -> Tensor:
    inputs = tiny(name)[1]
    with torch.no_grad():
        return forward_of(state, functools.partial(run, name))(state, inputs)


# --- the output ensemble --------------------------------------------------------------------------


def test_the_ensemble_averages_outputs() -> None:
    one, two = moved("bert", 1), moved("bert", 2)
    found = answers("bert", merged("ensemble", "bert", [one, two], (1.0, 0.5)))
    expected = (answers("bert", one) + 0.5 * answers("bert", two)) / 1.5
    torch.testing.assert_close(found, expected)
    alone = merged("ensemble", "bert", [one, two], (0.0, 0.5))
    torch.testing.assert_close(answers("bert", alone), answers("bert", two))


def test_the_ensemble_tries_each_ratio_once() -> None:
    tried = [s.coefficients for s in merger("ensemble").method.search_space(2)]
    assert len(tried) == len({a / (a + b) for a, b in tried})
    assert (0.5, 1.0) in tried
    assert (1.0, 0.5) in tried


# --- EMR ------------------------------------------------------------------------------------------


def flat(state: State, base: State) -> np.ndarray:
    keys = ("w", "b", "scalar")
    return np.concatenate([(state[k].double() - base[k].double()).reshape(-1) for k in keys])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0)])
def test_emr_elects_masks_and_rescales(weights: tuple[float, float]) -> None:
    base, experts = members(4, 2)
    found = merger("emr").method.merge(base, experts, Setting(weights), known("bert"), generator())
    assert isinstance(found, PerTask)
    taus = np.stack([flat(expert, base) for expert in experts])[: sum(w > 0 for w in weights)]
    sign = np.sign(taus.sum(0))
    uni = sign * np.where(taus * sign > 0, np.abs(taus), 0).max(0)
    np.testing.assert_allclose(flat(found.common, base), uni, atol=1e-6)
    tasks = list(TASKS)
    for task, tau in zip(tasks, taus, strict=False):
        mask = tau * sign > 0
        scale = np.abs(tau).sum() / np.abs(mask * uni).sum()
        np.testing.assert_allclose(flat(found.of(task), base), scale * mask * uni, atol=1e-5)
    left_out = tasks[len(taus) :]
    assert all(found.of(task) is found.common for task in left_out)


def test_emr_of_one_expert_is_that_expert() -> None:
    base, (expert,) = members(5, 1)
    found = merger("emr").method.merge(base, [expert], Setting((1.0,)), known("bert"), generator())
    assert isinstance(found, PerTask)
    for key, value in found.of(next(iter(TASKS))).items():
        torch.testing.assert_close(value, expert[key])


def test_what_a_model_per_task_holds() -> None:
    base, (one, two) = members(6, 2)
    found = PerTask(base, {"a": one, "b": two})
    assert digest(found) != digest(PerTask(base, {"a": two, "b": one}))
    assert_equal(found.of("elsewhere"), base)
    merged_well(found, base, "merged")
    broken = PerTask(base, {"a": one, "b": {**two, "w": two["w"] * float("nan")}})
    with pytest.raises(CheckpointError, match="for b: tensor 'w' holds NaN"):
        merged_well(broken, base, "merged")
    with pytest.raises(CheckpointError, match="NaN"):
        merged_well(ForeignState({"x": torch.tensor(float("nan"))}, lambda s, i: s["x"]), base, "m")


# --- SMILE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("route", ["linear", "block"])
def test_smile_of_equal_experts_is_that_expert(name: str, route: str) -> None:
    expert = moved(name, 3)
    found = merged(f"smile(rank=999, route={route})", name, [expert, expert], (1.0, 1.0))
    expected = answers(name, expert)
    assert (answers(name, state_of(tiny(name)[0])) - expected).abs().max() > 1e-2
    torch.testing.assert_close(answers(name, found), expected, rtol=1e-3, atol=1e-4)
    # Its hooks are gone.
    torch.testing.assert_close(answers(name, expert), expected)


def test_smile_routes_each_token_to_the_expert_it_excites() -> None:
    """In the first Linear that reads the hidden state: V of the winner catches most of x."""
    model, inputs = tiny("bert")
    base, anatomy = state_of(model), Anatomy.of(model)
    experts = [moved("bert", 1), moved("bert", 2)]
    state = merged("smile(rank=3, gate_rank=2, route=linear)", "bert", experts, (1.0, 1.0))
    q = anatomy.attention[0].q
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, output: Tensor) -> Tensor:
        seen["x"] = x.detach()
        return output

    def given(x: Tensor, output: Tensor) -> Tensor:
        seen["y"] = output.detach()
        return output

    with taps.follow(model, {q.weight.key: keep}):
        answers("bert", base)
    forward = forward_of(state, functools.partial(run, "bert"))
    after = {q.weight.key: given}
    # Registered before SMILE's own hooks, this one sees the base's output; after them, theirs.
    with torch.no_grad(), taps.follow(model, after):
        forward(state, inputs)
    x = seen["x"].double()
    assert q.bias is not None
    expected = x @ q.weight.read(base).double().T + q.bias.read(base).double()
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-4, atol=1e-5)
    svds = [
        torch.linalg.svd(q.weight.read(e).double() - q.weight.read(base).double()) for e in experts
    ]
    scores = torch.stack([(x @ v[:2].T).norm(dim=-1) for _, _, v in svds], -1)
    best = scores.argmax(-1)
    assert 0 < int(best.sum()) < best.numel(), "both experts are chosen"
    for number, (expert, (u, s, v)) in enumerate(zip(experts, svds, strict=True)):
        step = (x @ v[:3].T * s[:3]) @ u[:, :3].T
        step = step + (q.bias.read(expert) - q.bias.read(base)).double()
        expected = torch.where((best == number)[..., None], expected + step, expected)
    router = _Router(state, _units(anatomy, "linear")[0], 0, [0, 1], whole=False)
    routed = router.through(q)(seen["x"], seen["y"])
    torch.testing.assert_close(routed.double(), expected, rtol=1e-3, atol=1e-4)


def test_smile_by_block_keeps_a_locked_expert_whole() -> None:
    """Per token and Linear a lock mixes gauges; a whole block has one gauge."""
    model = tiny("bert")[0]
    anatomy = Anatomy.of(model)
    expert = moved("bert", 1)
    locked = dict(expert)
    for block in anatomy.attention:
        apply_vo(locked, block, invertible(block.kv_heads, block.head_dim, generator(9), 10.0))
    torch.testing.assert_close(
        answers("bert", locked), answers("bert", expert), rtol=1e-3, atol=1e-4
    )
    found = merged("smile(rank=999)", "bert", [locked, locked], (1.0, 1.0))
    torch.testing.assert_close(
        answers("bert", found), answers("bert", expert), rtol=1e-3, atol=1e-3
    )


# --- access and the pipeline ----------------------------------------------------------------------


def test_all_of_them_are_tested_here() -> None:
    aware = {name for name in methods.MERGERS.names() if methods.MERGERS.get(name).task_aware}
    assert aware == {spec.split("(")[0] for spec in MERGERS}


@pytest.mark.parametrize("spec", MERGERS)
def test_what_they_may_not_do_without_knowing_the_task(spec: str) -> None:
    base, experts = state_of(tiny("bert")[0]), [moved("bert", 1), moved("bert", 2)]
    method = merger(spec).method
    assert method.task_aware
    with pytest.raises(MethodError, match="needs to know"):
        method.merge(base, experts, Setting((1.0, 1.0)), None, generator())
    plain = known("bert", task_id=False)
    with pytest.raises(AccessError):
        method.merge(base, experts, Setting((1.0, 1.0)), plain, generator())


@pytest.mark.slow
@pytest.mark.parametrize("partners", [1, 3])
def test_their_cells_stand_on_their_own_track(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partners: int
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    tasks = methods.testbed("digits").method.tasks[: 1 + partners]
    suite = Suite.model_validate(
        load("smoke").model_dump()
        | {
            "groups": [{"victim": tasks[0], "partners": tasks[1:]}],
            "defenses": ("none", "mergelock"), "attacks": ("none", "finetune-recovery"),
            "mergers": ("emr", "ensemble", "average"), "test": 100, "validation_rungs": (8, 16),
        }
    )  # fmt: skip
    device = torch.device("cpu")
    try:
        cells = running.execute(planning.make(suite, device), tmp_path / "run", device)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    assert {cell.status for cell in cells} <= {"ok", "no-benefit"}, [c.reason for c in cells]
    assert all(cell.task_id == (cell.merger != "average") for cell in cells)
    locked = {c.merger: c for c in cells if (c.defense, c.attack) == ("mergelock", "none")}
    # No merge of weights at all: a lock takes nothing away.
    assert locked["ensemble"].protection == pytest.approx(0.0, abs=0.02)
    assert locked["ensemble"].access == "weights"
