"""Training-time defenses: their loss is the printed equation, their searches are on record."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plane import PLANE, RECIPE, TASKS, WIDTH, given
from torch import Tensor

from benchmark.anatomy import Anatomy, AttentionBlock, Linear, Slot
from benchmark.api.contracts import Victim
from benchmark.api.methods import defense
from benchmark.api.recipe import Batch
from benchmark.core.data import Split
from benchmark.core.errors import UsageError
from benchmark.core.state import State, digest, task_vector
from benchmark.learn.training import fine_tune
from defenses.arf import RepulsionLoss, distances
from defenses.mergeguard import MergeGuard, WeightNormLoss, top_share
from defenses.trap2 import Trap2, TrapLoss, draw_scale, scaled

TRAINED = ("trap2", "mergeguard", "arf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def owner(expert: State, **fields: Any) -> tuple[Victim, dict[str, object]]:
    """A victim on the linear testbed, and what its defense notes."""
    task, notes = TASKS["signs"], {}

    def train(start: State, examples: Any, rng: torch.Generator, **options: Any) -> State:
        return fine_tune(PLANE, {"signs": task}, start, examples, rng, **options)

    made = {
        "base": PLANE.base(),
        "expert": expert,
        "anatomy": PLANE.anatomy(),
        "task": task,
        "recipe": RECIPE,
        "fine_tune": train,
        "initialise": PLANE.initialise,
        "features": PLANE.features,
        "module": PLANE.module(),
        "note": notes.__setitem__,
    }
    return Victim(**{**made, **fields}), notes


def trained(seed: int = 0) -> State:
    examples = {"signs": TASKS["signs"].train}
    return fine_tune(PLANE, TASKS, PLANE.base(), examples, generator(seed))


def batch(seed: int = 3) -> tuple[Batch, Tensor, np.ndarray]:
    """Ten examples for a linear model, their labels, and the examples in numpy."""
    rng = generator(seed)
    x = torch.randn(10, 4, generator=rng)
    labels = torch.randint(3, (10,), generator=rng)
    made = given(Split({}, labels), lambda state: x @ state["w"].T + state["b"])
    return made, labels, x.double().numpy()


def entropy(x: np.ndarray, w: np.ndarray, b: np.ndarray, labels: Tensor) -> float:
    """Cross-entropy, written out."""
    logits = x @ w.T + b
    right = logits[np.arange(len(x)), labels.numpy()]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - right))


def weights(seed: int) -> State:
    rng = generator(seed)
    return {"w": torch.randn(3, 4, generator=rng), "b": torch.randn(3, generator=rng)}


def plain(state: State) -> list[np.ndarray]:
    return [state[key].double().numpy() for key in ("w", "b")]


# Trap²


@pytest.mark.parametrize("inverse", ["linear", "sqrt"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_trap_loss_is_the_printed_equation(inverse: str, weight: float) -> None:
    examples, labels, x = batch()
    base, state = weights(1), weights(2)
    found = TrapLoss(base, weight, inverse)(examples, state, generator(4))  # type: ignore[arg-type]
    s = draw_scale(generator(4))
    (w0, b0), (w, b) = plain(base), plain(state)
    factor = 1 / s if inverse == "linear" else 1 / math.sqrt(s)
    trap = entropy(x, w0 + s * (w - w0), b0 + s * (b - b0), labels)
    assert float(found) == pytest.approx(
        entropy(x, w, b, labels) - weight * factor * trap, rel=1e-5
    )


def test_trap_cap_bounds_the_adversarial_loss_only() -> None:
    examples, labels, x = batch()
    base = weights(1)
    state = {key: value.clone().requires_grad_() for key, value in weights(2).items()}
    s = draw_scale(generator(4))
    capped = TrapLoss(base, 0.3, cap=0.01)(examples, state, generator(4))
    w, b = plain({key: value.detach() for key, value in state.items()})
    assert float(capped.detach()) == pytest.approx(
        entropy(x, w, b, labels) - 0.3 / s * 0.01, rel=1e-5
    )
    # Above the cap the gradient is that of the plain loss; below it the cap does nothing.
    gradient = torch.autograd.grad(capped, state["w"])[0]
    free = TrapLoss(base, 0.0)(examples, state, generator(4))
    torch.testing.assert_close(gradient, torch.autograd.grad(free, state["w"])[0])
    loose, none = (
        TrapLoss(base, 0.3, cap=cap)(examples, state, generator(4)) for cap in (1e6, None)
    )
    assert torch.equal(loose, none)


def test_scale_is_never_in_the_band_around_one() -> None:
    rng = generator()
    drawn = np.array([draw_scale(rng) for _ in range(20_000)])
    assert drawn.min() >= 0.05
    assert drawn.max() <= 2.0
    assert np.abs(drawn - 1).min() >= 0.05
    # Uniform on what is left: 0.9 of 1.85 below the band.
    assert np.mean(drawn < 1) == pytest.approx(0.9 / 1.85, abs=0.015)
    assert drawn.min() < 0.06
    assert drawn.max() > 1.99


def test_scaled_shares_what_did_not_move() -> None:
    base, moved = weights(1), weights(2)
    state = {**base, "w": moved["w"]}
    found = scaled(base, state, 0.5)
    assert found["b"] is base["b"]
    torch.testing.assert_close(found["w"], (base["w"] + moved["w"]) / 2)


def test_trap_recipe() -> None:
    victim, _ = owner(trained())
    full, lora = (Trap2(adapter=adapter, steps=1.5).recipe(victim) for adapter in ("full", "lora"))  # type: ignore[arg-type]
    assert (full.steps, full.schedule, full.betas, full.eps) == (60, "cosine", (0.9, 0.98), 1e-6)
    assert (full.frozen, full.learning_rate, full.lora) == (RECIPE.frozen, 0.05, None)
    assert lora.learning_rate == 0.5
    assert lora.lora is not None
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.targets) == (16, 16, ("q", "k", "v", "o"))


def spoiled(expert: State, breaks_at: float, seen: list[float]) -> Callable[..., State]:
    """A training that gives the expert, or from the weight ``breaks_at`` on its negative."""

    def train(start: State, examples: Any, rng: torch.Generator, **options: Any) -> State:
        loss = options["loss"]
        seen.append(getattr(loss, "weight", None) or getattr(loss, "alpha", 0.0))
        torch.rand(1, generator=rng)
        return dict(expert) if seen[-1] < breaks_at else {**expert, "weight": -expert["weight"]}

    return train


def test_trap_search_stops_at_the_first_failure_and_releases_the_last_that_passed() -> None:
    expert, seen = trained(), []
    victim, notes = owner(expert, fine_tune=spoiled(expert, 0.2, seen))
    rng = generator()
    released = Trap2(grid=(0.05, 0.1, 0.2, 0.4)).protect(victim, rng)
    assert seen == [0.05, 0.1, 0.2]
    assert digest(released) == digest(expert)
    assert notes["trap2.weight"] == 0.1
    tried: Any = notes["trap2.search"]
    assert [(one["weight"], one["passed"]) for one in tried] == [
        (0.05, True), (0.1, True), (0.2, False)
    ]  # fmt: skip
    assert tried[0]["drop"] == 0
    assert tried[2]["drop"] > 0.5
    # The generator is left as after that weight alone, so composites draw alike.
    alone = generator()
    Trap2(weight=0.1).protect(victim, alone)
    assert torch.equal(alone.get_state(), rng.get_state())


def test_trap_search_that_never_passes_releases_the_smallest_and_says_so() -> None:
    expert, seen = trained(), []
    victim, notes = owner(expert, fine_tune=spoiled(expert, 0.0, seen))
    released = Trap2(grid=(0.05, 0.1)).protect(victim, generator())
    assert seen == [0.05]
    assert not torch.equal(released["weight"], expert["weight"])
    assert [one["passed"] for one in notes["trap2.search"]] == [False]  # type: ignore[attr-defined]


def test_searched_and_given_weight_release_the_same_bits() -> None:
    victim, notes = owner(trained())
    found = Trap2(grid=(0.01, 0.02), tolerance=1.0).protect(victim, generator(7))
    assert notes["trap2.weight"] == 0.02
    assert digest(found) == digest(Trap2(weight=0.02).protect(victim, generator(7)))
    assert digest(found) != digest(Trap2(weight=0.01).protect(victim, generator(7)))
    assert found["e.scale"] is victim.base["e.scale"]


def test_a_capped_run_says_that_it_is_a_variant() -> None:
    victim, notes = owner(trained())
    Trap2(weight=0.02, adv_loss_cap=2.0).protect(victim, generator())
    assert "capped at 2" in str(notes["trap2.variant"])


# MergeGuard


def test_weight_norm_loss_counts_what_is_trained() -> None:
    examples, labels, x = batch()
    state = weights(2)
    state["w"].requires_grad_()
    found = WeightNormLoss(0.01)(examples, state, generator())
    w, b = plain({key: value.detach() for key, value in state.items()})
    expected = entropy(x, w, b, labels) + 0.01 * np.sum(w * w)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def layered() -> tuple[State, State, Callable[..., Tensor]]:
    """Base and expert of ten layers, of which the first two alone make the features."""
    rng = generator(5)
    base = {f"{i}.weight": torch.randn(WIDTH, WIDTH, generator=rng) for i in range(10)}
    base |= {f"{i}.bias": torch.zeros(WIDTH) for i in range(10)}
    expert = {k: v + 0.5 * torch.randn(v.shape, generator=rng) for k, v in base.items()}
    expert["0.weight"] = 3 * torch.eye(WIDTH)
    # Labels are the sign of x[0], and the head's two directions are e0 and e1.
    expert["0.weight"][0, 0], expert["0.weight"][1, 0] = -9.0, 9.0

    def features(state: State, inputs: Any) -> Tensor:
        hidden = inputs["x"] @ state["0.weight"].T + state["0.bias"]
        rest = sum(state[f"{i}.weight"].sum() for i in range(1, 10))
        return torch.nn.functional.normalize(hidden + 1e-3 * rest, dim=-1)

    return base, expert, features


@pytest.mark.parametrize("importance", ["tau-grad", "tau", "theta"])
def test_second_stage_resets_the_share_it_should(importance: str) -> None:
    base, expert, features = layered()
    victim, notes = owner(expert, base=base, features=features)
    guard = MergeGuard(stages="second", critical=0.2, fraction=0.25, importance=importance)  # type: ignore[arg-type]
    released = guard.protect(victim, generator())
    critical: Any = notes["mergeguard.critical"]
    assert len(critical) == 2
    assert critical[0] == "0"  # the only layer that accuracy depends on
    total = reset = 0
    values, kept = [], []
    for key in base:
        if key.split(".")[0] in critical:
            assert torch.equal(released[key], expert[key])
            continue
        back = released[key] != expert[key]
        torch.testing.assert_close(released[key][back], base[key][back])
        total, reset = total + back.numel(), reset + int(back.sum())
        size = (expert[key] - base[key]).abs() if importance == "tau" else expert[key].abs()
        values, kept = [*values, size[back]], [*kept, size[~back]]
    assert reset == round(0.25 * total)
    if importance != "tau-grad":
        assert float(torch.cat(values).min()) >= float(torch.cat(kept).max())


def test_beta_two_negates_what_beta_one_resets() -> None:
    base, expert, features = layered()
    victim, _ = owner(expert, base=base, features=features)
    one, two = (
        task_vector(MergeGuard(stages="second", beta=beta).protect(victim, generator()), base)
        for beta in (1.0, 2.0)
    )
    tau = task_vector(expert, base)
    flat = [torch.cat([s[k].flatten() for k in tau]) for s in (one, two, tau)]
    changed = (flat[1] - flat[2]).abs() > 1e-3
    torch.testing.assert_close(flat[0][changed], torch.zeros(int(changed.sum())), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat[1][changed], -flat[2][changed], atol=1e-5, rtol=1e-5)
    assert changed.any()


def test_tau_grad_is_the_product_by_hand() -> None:
    base, expert, features = layered()
    victim, _ = owner(expert, base=base, features=features)
    tau = {"0.weight": task_vector(expert, base)["0.weight"]}
    found = MergeGuard()._importance(victim, expert, tau, generator())["0.weight"]
    leaf = expert["0.weight"].clone().requires_grad_()
    task = victim.task
    logits = 10.0 * features({**expert, "0.weight": leaf}, task.train.inputs) @ task.head.T
    loss = torch.nn.functional.cross_entropy(logits, task.train.labels, reduction="sum")
    gradient = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(found, (tau["0.weight"] * gradient).abs(), rtol=1e-4, atol=1e-5)


def test_top_share_takes_exactly_that_many_ties_included() -> None:
    values = {"a": torch.zeros(7), "b": torch.tensor([[3.0, 0.0], [1.0, 2.0]])}
    masks = top_share(values, 0.5)  # round(5.5) = 6, to even
    assert sum(int(mask.sum()) for mask in masks.values()) == 6
    assert masks["b"].tolist() == [[True, False], [True, True]]
    assert masks["a"].tolist() == [True] * 3 + [False] * 4
    assert not any(mask.any() for mask in top_share(values, 0.0).values())


def test_tuning_scales_constants_down_and_notes_it() -> None:
    expert, seen = trained(), []
    victim, notes = owner(expert, fine_tune=spoiled(expert, 5e-4, seen))
    MergeGuard(tune=True, stages="first").protect(victim, generator())
    assert seen == pytest.approx([0.01, 0.001, 0.0001])
    assert notes["mergeguard.alpha"] == pytest.approx(1e-4)
    drops = [one["drop"] for one in notes["mergeguard.search.alpha"]]  # type: ignore[attr-defined]
    assert drops[0] > 0.5
    assert drops[-1] == 0
    seen.clear()
    MergeGuard(stages="first").protect(victim, generator())
    assert seen == [0.01]  # the published constant, whatever it costs


def test_beta_is_tuned_without_training() -> None:
    base, expert, features = layered()
    victim, notes = owner(expert, base=base, features=features, fine_tune=None)
    guard = MergeGuard(stages="second", fraction=1.0, critical=0.0, beta=1.3, tune=True)
    released = guard.protect(victim, generator())
    tried: Any = notes["mergeguard.search.beta"]
    assert [one["beta"] for one in tried][:2] == [1.3, 0.65]
    assert tried[0]["drop"] > 0.015 >= tried[-1]["drop"]
    beta: Any = notes["mergeguard.beta"]
    for key in base:
        torch.testing.assert_close(released[key], expert[key] - beta * (expert[key] - base[key]))


# ARF


def attention(anchor: State) -> tuple[Slot, ...]:
    return tuple(Slot(key) for key in anchor)


def test_repulsion_loss_is_the_printed_equation() -> None:
    examples, labels, x = batch()
    base = weights(1)
    near = {key: value * 1.01 for key, value in base.items()}
    far = {**near, "w": base["w"] * 1.5}
    for state, norms in ((near, 2), (far, 1)):
        loss = RepulsionLoss(base, attention(base), 2.0, 0.05)
        found = loss(examples, state, generator())
        sizes = [float(np.linalg.norm(value)) for value in plain(base)]
        pushed = sum(0.04 * size for size in (sizes if norms == 2 else sizes[1:]))
        expected = entropy(x, *plain(state), labels) + 2.0 * pushed
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_repulsion_has_a_finite_gradient_at_the_base() -> None:
    examples, _, _ = batch()
    base = weights(1)
    state = {key: value.clone().requires_grad_() for key, value in base.items()}
    loss = RepulsionLoss(base, attention(base), 1.0, 0.05)(examples, state, generator())
    gradients = torch.autograd.grad(loss, list(state.values()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_arf_reaches_its_distance() -> None:
    block = AttentionBlock(*(Linear(Slot("weight")) for _ in range(4)), 1, 1, WIDTH)
    victim, notes = owner(trained(), anatomy=Anatomy("plane", (block,), ()))
    slots = (Slot("weight"),)
    (without,) = distances(victim.base, victim.expert, slots)
    wanted = 3 * without
    released = defense(f"arf(distance={wanted}, steps=3)").method.protect(victim, generator())
    (reached,) = distances(victim.base, released, slots)
    assert 0.99 * wanted < reached < 1.4 * wanted
    assert notes["arf.distance"] == pytest.approx([reached] * 4)
    # Which the task alone would not reach in as many steps.
    alone = defense("arf(weight=0, steps=3)").method.protect(victim, generator())
    assert distances(victim.base, alone, slots)[0] < 0.8 * wanted
    assert victim.accuracy(released, TASKS["signs"].test) > 0.85


# Accuracy, specs, cards


def test_accuracy_counts_nan_as_wrong() -> None:
    expert = trained()
    victim, _ = owner(expert)
    split = TASKS["signs"].test
    right = (PLANE.features(expert, split.inputs) @ victim.task.head.T).argmax(1) == split.labels
    for size in (7, 512):
        assert victim.accuracy(expert, split, size) == int(right.sum()) / len(right)
    broken = {**expert, "weight": expert["weight"] * float("nan")}
    assert victim.accuracy(broken, split) == 0.0


@pytest.mark.parametrize("name", TRAINED)
def test_cards(name: str) -> None:
    card = defense(name).method.card
    assert card.trains
    assert not card.exact
    assert card.arxiv


@pytest.mark.parametrize(
    "spec",
    [
        "trap2(weight=-1)",
        "trap2(grid=(0.1, 0.1))",
        "trap2(grid=())",
        "trap2(adv_loss_cap=0)",
        "trap2(steps=0)",
        "trap2(adapter=dora)",
        "mergeguard(fraction=1.5)",
        "mergeguard(alpha=-1)",
        "mergeguard(stages=third)",
        "arf(distance=0)",
        "arf(weight=-1)",
        "mergelock+trap2",
    ],
)
def test_out_of_range(spec: str) -> None:
    with pytest.raises(UsageError):
        defense(spec)


def test_specs_carry_a_grid() -> None:
    assert defense("trap2(grid=(0.1, 0.2))").method == Trap2(grid=(0.1, 0.2))
    assert defense(defense("trap2(grid=(0.1, 0.2))").spec).method == Trap2(grid=(0.1, 0.2))
