"""The fine-tuning loop on a linear testbed, where what it should do is plain."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from plane import PLANE, RECIPE, TASKS, Plane, noisy, tuned
from torch import Tensor

from benchmark.api.recipe import Recipe, plain
from benchmark.core.data import Split
from benchmark.core.state import State, digest
from benchmark.learn.training import at_most, fine_tune


def accuracy(state: State, name: str) -> float:
    split = TASKS[name].test
    guess = (PLANE.features(state, split.inputs) @ TASKS[name].head.T).argmax(1)
    return float((guess == split.labels).float().mean())


def test_it_learns_each_task_and_both() -> None:
    base = PLANE.base()
    for names in (("signs",), ("order",), ("signs", "order")):
        state = tuned(*names, recipe=replace(RECIPE, steps=60 * len(names)))
        for name in names:
            assert accuracy(state, name) > max(0.9, accuracy(base, name) + 0.2)


def test_start_is_untouched_and_untrained_tensors_are_shared() -> None:
    start = PLANE.base()
    before = digest(start)
    examples = {"signs": TASKS["signs"].train}
    state = fine_tune(PLANE, TASKS, start, examples, torch.Generator().manual_seed(0))
    assert digest(start) == before
    assert list(state) == list(start)
    assert state["e.scale"] is start["e.scale"]
    assert state["position_ids"] is start["position_ids"]
    assert state["weight"] is not start["weight"]
    assert not torch.equal(state["weight"], start["weight"])
    assert not any(value.requires_grad for value in state.values())


def test_the_seed_decides() -> None:
    assert digest(tuned(seed=3)) == digest(tuned(seed=3))
    assert digest(tuned(seed=3)) != digest(tuned(seed=4))


def test_tasks_alternate_and_epochs_cover_every_row() -> None:
    recipe = Recipe(steps=20, batch_size=20, learning_rate=0.01, warmup=0)
    rows: dict[str, list[int]] = {name: [] for name in TASKS}
    order: list[str] = []
    examples = {
        name: Split({**task.train.inputs, "row": task.train.inputs["row"]}, task.train.labels)
        for name, task in TASKS.items()
    }

    class Watch(Plane):
        def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            # Both tasks share their inputs; the steps tell them apart.
            name = "order" if len(order) % 2 == 0 else "signs"
            order.append(name)
            rows[name] += inputs["row"].tolist()
            return super().features(state, inputs)

    rng = torch.Generator().manual_seed(0)
    fine_tune(Watch(), TASKS, PLANE.base(), examples, rng, recipe=recipe)
    assert len(order) == 20
    for seen in rows.values():  # 10 batches of 20: two epochs of 100 rows, in different orders
        assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100))
        assert seen[:100] != seen[100:]


def test_a_loss_may_evaluate_other_states_on_the_batch() -> None:
    base = PLANE.base()
    gaps = []

    def loss(batch, state, rng):
        assert batch.logits(state).requires_grad
        assert not batch.logits(base).requires_grad
        gaps.append(float((batch.logits(state) - batch.logits(base)).abs().max().detach()))
        torch.rand(1, generator=rng)
        return batch.loss(state)

    tuned(loss=loss)
    assert gaps[0] == 0.0
    assert gaps[-1] > 0.1


def test_loss_none_is_the_testbeds_own_which_is_cross_entropy() -> None:
    def written_out(batch, state, rng):
        return torch.nn.functional.cross_entropy(batch.logits(state), batch.labels)

    assert digest(tuned(loss=written_out)) == digest(tuned(loss=plain)) == digest(tuned())


def test_what_a_testbeds_loss_draws_every_state_is_given() -> None:
    """Noise and times of a denoising loss: alike within a batch, others in the next, and the same
    in the next training."""

    class Noisy(Plane):
        def loss(self, state, batch):
            drawn = torch.rand(len(batch.labels), generator=batch.rng())
            return (drawn * batch.logits(state).square().mean(1)).mean()

    def trained(seed: int) -> tuple[list[float], str]:
        seen = []

        def loss(batch, state, rng):
            torch.testing.assert_close(batch.loss(state), batch.loss(dict(state)), rtol=0, atol=0)
            seen.append(float(torch.rand(1, generator=batch.rng())))
            return batch.loss(state)

        rng = torch.Generator().manual_seed(seed)
        examples = {"signs": TASKS["signs"].train}
        state = fine_tune(Noisy(), TASKS, PLANE.base(), examples, rng, loss=loss)
        return seen, digest(state)

    seen, made = trained(0)
    assert len(set(seen)) == RECIPE.steps
    assert trained(0) == (seen, made)
    assert trained(1)[0] != seen


def test_gradient_clip_bounds_what_adam_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    tuned(recipe=Recipe(steps=5, clip=0.01))
    assert max(norms) <= 0.01001
    norms.clear()
    tuned(recipe=Recipe(steps=5, clip=None))
    assert max(norms) > 0.01001


def test_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(steps=80, warmup=10)
    rates = [recipe.rate(step) for step in range(81)]
    peak = rates.index(max(rates))
    assert peak == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 1.0
    assert rates[80] == 0.0
    assert min(rates[:80]) > 0.0


def test_cosine_rate() -> None:
    recipe = Recipe(steps=110, warmup=10, schedule="cosine")
    linear = replace(recipe, schedule="linear")
    assert [recipe.rate(s) for s in range(10)] == [linear.rate(s) for s in range(10)]
    assert recipe.rate(10) == 1.0
    assert recipe.rate(35) == pytest.approx(0.5 + 0.5 * 2**-0.5)
    assert recipe.rate(60) == pytest.approx(0.5)
    assert recipe.rate(110) == 0.0


def test_the_optimizer_gets_the_recipe_s_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    build = torch.optim.AdamW.__init__

    def watched(self, parameters, **options):
        seen.update(options)
        build(self, parameters, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", watched)
    tuned(recipe=Recipe(steps=1, betas=(0.9, 0.98), eps=1e-6, learning_rate=0.1, weight_decay=0.2))
    assert seen == {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def test_the_draws_of_recipes_stay_as_they_were() -> None:
    """Weights of version 0.1, before training could resume: experts must not change unnoticed.

    Another draw moves some entry by more than 0.01, another version's rounding by less than 1e-5.
    """

    def first_row(state: State) -> list[float]:
        return state["weight"][0].tolist()  # type: ignore[no-any-return]

    plain = [-2.3819, -0.1649, -1.0076, -0.9851, -0.2522, 0.1901, -0.3117, -0.8280]
    assert first_row(tuned("signs")) == pytest.approx(plain, abs=1e-3)
    recipe = replace(RECIPE, weight_decay=0.01, clip=0.1)
    state = tuned("signs", "order", seed=3, loss=noisy, recipe=recipe)
    drawn = [-2.1745, -0.4283, -0.8606, -1.1741, -0.2947, 0.0238, -0.4487, -1.0394]
    assert first_row(state) == pytest.approx(drawn, abs=1e-3)
    rng = torch.Generator().manual_seed(5)
    fine_tune(PLANE, TASKS, PLANE.base(), {"signs": TASKS["signs"].train}, rng, loss=noisy)
    assert int(torch.randint(10**9, (1,), generator=rng)) == 434824706


def test_fewer_examples_than_a_batch() -> None:
    few = {"signs": TASKS["signs"].train[:5]}
    calls = []
    state = fine_tune(
        PLANE,
        TASKS,
        PLANE.base(),
        few,
        torch.Generator().manual_seed(0),
        progress=lambda now, total: calls.append((now, total)),
    )
    guess = (PLANE.features(state, few["signs"].inputs) @ TASKS["signs"].head.T).argmax(1)
    assert torch.equal(guess, few["signs"].labels)
    assert calls == [(step, 40) for step in range(1, 41)]


def test_thread_limit_is_lifted_afterwards() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), at_most(1):
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
    with at_most(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
