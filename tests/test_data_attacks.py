"""Attacks that use data: what they recover, what they are charged, what they may not reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from plane import PLANE, RECIPE, TASKS, given, tuned
from test_attacks import distance, lock, setting
from torch import Tensor
from zoo import TOLERANCE, drift, generator, invertible, tiny

from attacks.activation_matching import ActivationMatching
from attacks.distil_merge import DistilMerge
from attacks.layer_refit import LayerRefit
from attacks.mergetune import MergeTune
from attacks.rinse import Rinse
from benchmark.anatomy import apply_vo, permute_heads, permute_units, taps
from benchmark.anatomy.gauges import align
from benchmark.api.contracts import Access, Attack, Knowledge
from benchmark.core.data import Split, Task
from benchmark.core.errors import AccessError
from benchmark.core.state import ForeignState, State, digest, norm, task_vector
from benchmark.learn.training import fine_tune

DATA: list[Attack] = [ActivationMatching(), LayerRefit(), DistilMerge(), Rinse(), MergeTune()]
FLOPS = 2.0  # per example, of the linear testbed: any figure will do


# --- forward passes on a tiny transformer ---------------------------------------------------------


@functools.cache
def images(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the attacker has, and what it is judged on."""
    rng = generator(5)
    if name == "vit":
        made = [{"pixel_values": torch.randn(48, 3, 8, 8, generator=rng)} for _ in range(2)]
    else:
        made = [{"input_ids": torch.randint(4, 40, (48, 6), generator=rng)} for _ in range(2)]
        for part in made:
            part["attention_mask"] = torch.ones_like(part["input_ids"])
    return made[0], made[1]


def run(name: str, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = torch.func.functional_call(
            tiny(name)[0], dict(state), kwargs=dict(inputs), tie_weights=False
        )
    return found[0]


def observed(name: str, shipped: State | None = None) -> Knowledge:
    base, _, partner, anatomy = setting(name)
    split = Split(images(name)[0], torch.zeros(48, dtype=torch.int64))
    tasks = {"t": Task("t", ("c",), split, split, split, torch.eye(2), 1.0)}
    return Knowledge(
        Access.UNLABELED, base, [partner], anatomy, tasks=tasks, module=tiny(name)[0],
        features=functools.partial(run, name), shipped=shipped, flops_per_example=FLOPS,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "qwen2"])
def test_activation_matching_recovers_units_and_value_heads(name: str) -> None:
    model, inputs = tiny(name)
    base, expert, _, anatomy = setting(name)

    def locked(state: State) -> State:
        out, rng = dict(state), generator(3)
        for block in anatomy.attention:
            shape = (block.kv_heads, block.head_dim)
            apply_vo(out, block, invertible(*shape, rng, 1e2))
            permute_heads(out, block, torch.randperm(block.kv_heads, generator=rng))
        for mlp in anatomy.mlp:
            permute_units(out, mlp, torch.randperm(mlp.width(out), generator=rng))
        return out

    released, own = locked(expert), observed(name)
    found = ActivationMatching(per_task=40).recover(released, own, generator(0))
    for mlp in anatomy.mlp:
        for slot in mlp.rows():
            assert torch.equal(slot.read(found), slot.read(expert))
    # Value heads are fitted to noisy activations: near, where weights give the exact answer.
    before, after = (distance(s, expert, base, expert) for s in (released, found))
    assert before > 20
    assert after < 2
    assert drift(model, released, found, inputs) <= TOLERANCE
    assert own.budget.examples == 40
    assert own.budget.flops == 2 * 40 * FLOPS
    # Without fine-tuning in between nothing is noisy.
    exact = ActivationMatching(per_task=40).recover(locked(base), observed(name), generator(0))
    assert distance(exact, base, base, expert) < 0.2


def foreign(name: str, state: State) -> ForeignState:
    """``state`` behind another activation."""
    model, _ = tiny(name)
    blocks = setting(name)[3].mlp

    def other(up: Tensor, gate: Tensor | None) -> Tensor:
        gated = torch.nn.functional.silu(1.3 * (up if gate is None else gate))
        return gated if gate is None else gated * up

    def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        with taps.replace(model, dict.fromkeys(blocks, other)):
            return run(name, state, inputs)

    return ForeignState(state, forward)


@pytest.mark.parametrize("kind", ["foreign", "permuted"])
@pytest.mark.parametrize("name", ["vit", "bert", "qwen2"])
def test_layer_refit_rebuilds_what_an_mlp_does(name: str, kind: str) -> None:
    base, expert, _, anatomy = setting(name)
    released, shipped = lock(expert, anatomy, "general"), None
    inputs = images(name)[1]
    wanted = run(name, released, inputs)
    if kind == "foreign":
        shipped = foreign(name, released)
        wanted = shipped.forward(shipped, inputs)
        # A merger sees the base's MLP, which is all that it can read.
        released = dict(shipped)
        for mlp in anatomy.mlp:
            for slot in (*mlp.rows(), *mlp.down.slots()):
                released[slot.key] = base[slot.key]
    own = observed(name, shipped)
    found = LayerRefit(steps=150, rate=3e-3).recover(released, own, generator(0))

    def error(state: State) -> float:
        return float((run(name, state, inputs) - wanted).norm() / wanted.norm())

    assert error(found) < 0.1
    assert error(found) < 0.5 * error(base)
    if kind == "foreign":
        assert error(found) < 0.5 * error(expert), "the right units behind the wrong activation"
    assert own.budget.examples == 48
    # Attention is aligned, and nothing else: no data enters it.
    aligned = align(released, base, anatomy)
    for block in anatomy.attention:
        for linear in block.linears().values():
            for slot in linear.slots():
                assert torch.equal(found[slot.key], aligned[slot.key])


# --- training, on a linear testbed ----------------------------------------------------------------


def plane(access: Access, shipped: State | None = None, train: Any = None) -> Knowledge:
    def ours(
        start: State, examples: Mapping[str, Split], rng: torch.Generator, **rest: Any
    ) -> State:
        return fine_tune(PLANE, TASKS, start, examples, rng, **rest)

    return Knowledge(
        access, PLANE.base(), [tuned("order")], PLANE.anatomy(), tasks=TASKS, recipe=RECIPE,
        fine_tune=train or ours, features=PLANE.features, module=PLANE.module(), shipped=shipped,
        flops_per_example=FLOPS,
    )  # fmt: skip


def divergence(teacher: State, student: State) -> float:
    task = TASKS["signs"]
    a, b = (
        (task.scale * PLANE.features(s, task.test.inputs) @ task.head.T).log_softmax(1)
        for s in (teacher, student)
    )
    return float((a.exp() * (a - b)).sum(1).mean())


def test_distil_merge_answers_as_what_users_run() -> None:
    released = tuned()
    own = plane(Access.UNLABELED)
    student = DistilMerge(examples=60, steps=40).recover(released, own, generator(0))
    base = PLANE.base()
    assert divergence(released, student) < 0.1 * divergence(released, base)
    assert torch.equal(student["position_ids"], base["position_ids"])
    assert (own.budget.examples, own.budget.steps) == (60, 40)
    assert own.budget.flops >= 40 * 32 * FLOPS * (3 + 1)
    # A release that mergers cannot read has a teacher in what its users run.
    shipped = ForeignState(released, PLANE.features)
    blind = DistilMerge(examples=60, steps=40).recover(
        base, plane(Access.UNLABELED, shipped), generator(0)
    )
    assert digest(blind) == digest(student)


class Watched:
    """Stands for training: keeps its arguments, gives back what it was started from."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, start: State, examples: Mapping[str, Split], rng: torch.Generator, **rest: Any
    ) -> State:
        self.calls.append({"start": start, "examples": examples, **rest})
        return start


def test_rinse_trains_the_release_on_the_victim_s_task() -> None:
    train, released = Watched(), tuned()
    own = plane(Access.LABELED, train=train)
    Rinse(per_class=3, steps=7, batch_size=4).recover(released, own, generator(0))
    (call,) = train.calls
    assert call["start"] is released
    assert {k: v.labels.bincount().tolist() for k, v in call["examples"].items()} == {
        "signs": [3, 3]
    }
    assert (call["recipe"].steps, call["recipe"].batch_size) == (7, 4)
    assert (own.budget.examples, own.budget.steps) == (6, 7)
    assert own.budget.flops == 3 * FLOPS * 7 * 4
    better = Rinse(steps=20).recover(PLANE.base(), plane(Access.LABELED), generator(0))
    assert digest(better) != digest(PLANE.base())


def mergetune_loss(attack: MergeTune, released: State) -> tuple[Callable[..., Tensor], Knowledge]:
    train = Watched()
    own = plane(Access.LABELED, train=train)
    start = attack.recover(released, own, generator(0))
    base = PLANE.base()
    for key, value in start.items():
        if value.is_floating_point():
            mixed = (1 - attack.start) * base[key] + attack.start * released[key]
            torch.testing.assert_close(value, mixed)
    (call,) = train.calls
    assert call["recipe"].steps == attack.steps
    return call["loss"], own


def test_mergetune_minimises_its_formula() -> None:
    base, released, task = PLANE.base(), tuned(), TASKS["signs"]
    # As from a file: equal integers in another tensor.
    released["position_ids"] = released["position_ids"].clone()
    attack = MergeTune(per_class=4, steps=6, batch_size=8, start=0.3, anchor=2.0, path=0.7, draws=3)
    loss, own = mergetune_loss(attack, released)
    assert (own.budget.examples, own.budget.steps) == (8, 6)
    # Per step and example: a loss at w and one per draw, each forward and backward.
    assert own.budget.flops == 3 * FLOPS * 6 * 8 * (1 + 3)

    def logits(state: State) -> Tensor:
        return task.scale * PLANE.features(state, task.test.inputs) @ task.head.T

    w = tuned("order", seed=4)
    held = {**w, "weight": w["weight"].clone().requires_grad_()}
    value = loss(given(task.test, logits), held, generator(8))

    def plain(weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits({**w, "weight": weight}), task.test.labels)

    wanted = plain(w["weight"]) + 2.0 * (w["weight"] - base["weight"]).square().sum()
    draws = torch.rand(3, generator=generator(8))
    along = [plain(released["weight"] + a * (w["weight"] - released["weight"])) for a in draws]
    torch.testing.assert_close(value, wanted + 0.7 * torch.stack(along).mean())
    value.backward()
    assert held["weight"].grad is not None


def test_mergetune_runs_and_its_control_on_the_base_too() -> None:
    base = PLANE.base()
    attack = MergeTune(steps=10)
    for released in (tuned(), base, {k: v.clone() for k, v in base.items()}):
        own = plane(Access.LABELED)
        found = attack.recover(released, own, generator(0))
        assert norm(task_vector(found, base)) > 0
        assert own.budget.steps == 10
    near, far = (
        MergeTune(steps=10, anchor=anchor).recover(tuned(), plane(Access.LABELED), generator(0))
        for anchor in (100.0, 0.0)
    )
    assert norm(task_vector(near, base)) < norm(task_vector(far, base))


# --- tiers and parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("attack", DATA, ids=str)
def test_a_lower_tier_is_refused(attack: Attack) -> None:
    assert attack.access > Access.WEIGHTS
    for access in Access:
        if access < attack.access:
            own = plane(access)
            with pytest.raises(AccessError, match=f"only '{access.label}' given"):
                attack.recover(PLANE.base(), own, generator(0))
            assert own.budget.examples == 0


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (ActivationMatching, {"per_task": 0}), (ActivationMatching, {"ridge": 0.0}),
        (LayerRefit, {"steps": 0}), (LayerRefit, {"rate": 0.0}), (DistilMerge, {"examples": 0}),
        (Rinse, {"steps": 0}), (MergeTune, {"draws": 0}), (MergeTune, {"start": 1.5}),
        (MergeTune, {"anchor": -1.0}),
    ],
)  # fmt: skip
def test_parameters_out_of_range(cls: type, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        cls(**values)
