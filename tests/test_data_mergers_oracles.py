"""Mergers with data: their arithmetic, each against an independent way to the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from test_data_mergers import FAMILIES, ROWS, experts, features, known, tasks
from test_mergers import generator
from torch import Tensor
from zoo import tiny

from benchmark.anatomy import Anatomy, taps
from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.data import Split, Task
from benchmark.core.errors import MethodError
from benchmark.core.state import State, task_vector
from benchmark.merging.adamerging import AdaMerging, entropy
from benchmark.merging.fisher import Fisher, fisher
from benchmark.merging.neulig import NeuLig
from benchmark.merging.prodistill import ProDistill, calls, layers, run
from benchmark.merging.regmean import RegMean, gram, weights

# --- Fisher ---------------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients_of_single_examples() -> None:
    """Against one loop per example and class, and log p written out as probabilities."""
    told, state = known(), experts()[0]
    inputs = told.unlabeled(3, generator())["one"]
    keys = ["encoder.layer.1.output.dense.weight", "encoder.layer.0.attention.self.query.bias"]
    found = fisher(told, state, "one", inputs, keys, 9, generator())
    head, scale = tasks("bert")["one"].head, tasks("bert")["one"].scale
    for key in keys:
        expected = torch.zeros_like(state[key], dtype=torch.float64)
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            for label in range(3):
                leaf = state[key].clone().requires_grad_()
                logits = scale * features("bert", {**state, key: leaf}, one) @ head.T
                p = (logits.exp() / logits.exp().sum())[0, label]
                p.log().backward()
                expected += p.item() * leaf.grad.double().square() / 3
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-3, atol=1e-9)
        # Not the square of the mean gradient, which is 0 in expectation.
        assert expected.sum() > 0


def test_sampled_labels_have_the_same_mean() -> None:
    told, state = known(), experts()[0]
    inputs = told.unlabeled(2, generator())["one"]
    key = "encoder.layer.1.output.dense.bias"
    rng = generator(3)
    exact = fisher(told, state, "one", inputs, [key], 9, rng)[key]
    draws = [fisher(told, state, "one", inputs, [key], 0, rng)[key] for _ in range(150)]
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 150**0.5
    assert ((mean - exact).abs() <= 5 * error + 1e-9).all()
    assert error.max() > 0


def test_fisher_weighs_each_entry() -> None:
    told, members = known(), experts()
    method = Fisher(per_task=2)
    built = method.prepare(told.base, members, told, generator())
    found = built(Setting((0.3, 0.7)))
    rng = generator()
    inputs = known().unlabeled(2, rng)
    keys = list(task_vector(members[0], told.base))
    size, weight = [], []
    for task, member in zip(("one", "two"), members, strict=True):
        own = fisher(known(), member, task, inputs[task], keys, 9, rng)
        total = np.sqrt(sum(float(v.double().square().sum()) for v in own.values()))
        size.append(total)
        weight.append({k: np.maximum(v.double().numpy() / total, 1e-6) for k, v in own.items()})
    for key in keys:
        a, b = (m[key].double().numpy() for m in members)
        fa, fb = 0.3 * weight[0][key], 0.7 * weight[1][key]
        expected = (fa * a + fb * b) / (fa + fb)
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-4, atol=1e-5)
    # Word embeddings that no input used: the mean.
    key = "embeddings.word_embeddings.weight"
    unused = [i for i in range(40) if all(i not in inputs[t]["input_ids"] for t in inputs)]
    mean = (0.3 * members[0][key] + 0.7 * members[1][key])[unused]
    torch.testing.assert_close(found[key][unused], mean)


# --- RegMean --------------------------------------------------------------------------------------


def entering(name: str, state: State, inputs: Mapping[str, Tensor], key: str) -> np.ndarray:
    with torch.no_grad(), taps.record(tiny(name)[0], [key]) as seen:
        features(name, state, inputs)
    return seen[key].double().numpy()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_regmean_is_the_least_squares_fit(name: str) -> None:
    """α = 1 against numpy's own least squares on the stacked rows: 2 · 24 · 6 rows, 64 unknowns."""
    told, members = known(name), experts(name)
    built = RegMean(per_task=ROWS).prepare(told.base, members, told, generator())
    found = built(Setting((1.0, 1.0), {"alpha": 1.0}))
    average = merger("average").method.merge(
        told.base, members, Setting((1.0, 1.0)), None, generator()
    )
    inputs = known(name).unlabeled(ROWS, generator())
    block, mlp = told.anatomy.attention[0], told.anatomy.mlp[1]
    for slot in (block.q.weight, block.v.weight, block.o.weight, mlp.up.weight, mlp.down.weight):
        pairs = [
            (entering(name, member, inputs[task], slot.key), slot.read(member).double().numpy().T)
            for task, member in zip(("one", "two"), members, strict=True)
        ]
        x = np.concatenate([rows for rows, _ in pairs])
        y = np.concatenate([rows @ weight for rows, weight in pairs])
        expected = np.linalg.lstsq(x, y, rcond=None)[0].T
        own = slot.read(found).numpy()
        np.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-4)
        left = np.square(x @ own.T - y).sum()
        assert left < 0.95 * np.square(x @ slot.read(average).numpy().T - y).sum()
    handled = {slot.key for slot in weights(told.anatomy)}
    for key in set(found) - handled:
        assert torch.equal(found[key], average[key])


def test_alpha_shrinks_what_is_off_the_diagonal() -> None:
    told, members = known(), experts()
    built = RegMean(per_task=ROWS).prepare(told.base, members, told, generator())
    inputs = known().unlabeled(ROWS, generator())
    key = told.anatomy.mlp[0].up.weight.key
    grams = [
        (x := entering("bert", m, inputs[t], key)).T @ x
        for t, m in zip(("one", "two"), members, strict=True)
    ]
    for alpha in (0.0, 0.1, 0.9):
        shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
        pulls = sum(g @ m[key].double().numpy().T for g, m in zip(shrunk, members, strict=True))
        expected = np.linalg.inv(sum(shrunk)) @ pulls
        own = built(Setting((1.0, 1.0), {"alpha": alpha}))[key]
        np.testing.assert_allclose(own.numpy().T, expected, rtol=1e-4, atol=1e-5)
    # A setting that names none gets the largest under 1.
    default = built(Setting((1.0, 1.0)))[key]
    assert torch.equal(default, built(Setting((1.0, 1.0), {"alpha": 0.9}))[key])


def test_directions_that_no_input_enters_keep_the_mean() -> None:
    """Fewer rows than inputs: the Gram is singular, and α = 1 leaves it so."""
    told, members = known(), experts()
    built = RegMean(per_task=2).prepare(told.base, members, told, generator())
    found = built(Setting((1.0, 1.0), {"alpha": 1.0}))
    inputs = known().unlabeled(2, generator())
    key = told.anatomy.mlp[0].down.weight.key  # 96 inputs, 24 rows
    rows = np.concatenate(
        [entering("bert", m, inputs[t], key) for t, m in zip(inputs, members, strict=True)]
    )
    _, s, v = np.linalg.svd(rows)
    unseen = v[(s > 1e-9 * s[0]).sum() :]
    assert len(unseen) >= 70
    change = (found[key] - (members[0][key] + members[1][key]) / 2).double().numpy()
    assert np.abs(change @ unseen.T).max() < 1e-4 * np.abs(change).max()


def test_silent_and_dead_inputs_are_averaged() -> None:
    told = known()
    zero = torch.zeros(64, 64, dtype=torch.float64)
    own = [torch.randn(5, 64, generator=generator(i)) for i in range(2)]
    found = RegMean()._solve(own, [zero, zero], 0.9)
    torch.testing.assert_close(found, (own[0] + own[1]).double() / 2)
    assert set(gram(told, experts()[0], tasks("bert")["one"].train.inputs, [])) == set()


# --- AdaMerging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [True, False])
def test_adamerging_lowers_the_entropy(layerwise: bool) -> None:
    told, members = known(), experts(size=0.3)
    method = AdaMerging(layerwise=layerwise, steps=15, rate=0.02)
    found = method.prepare(told.base, members, told, generator())(Setting((1.0, 1.0)))
    start = merger("task-arithmetic").method.merge(
        told.base, members, Setting((0.3, 0.3)), None, generator()
    )

    def total(state: State) -> float:
        with torch.no_grad():
            return sum(
                float(entropy(told, state, name, task.train.inputs))
                for name, task in list(tasks("bert").items())[:2]
            )

    assert total(found) < total(start) - 0.02
    # One coefficient per expert and tensor, within [0, 1]; else one per expert.
    solved = []
    for key in task_vector(members[0], told.base):
        taus = torch.stack([(m[key] - told.base[key]).flatten() for m in members], 1).double()
        if taus.shape[0] > 16:
            moved = (found[key] - told.base[key]).flatten().double()
            answer = torch.linalg.lstsq(taus, moved[:, None]).solution[:, 0]
            torch.testing.assert_close(taus @ answer, moved, rtol=1e-3, atol=1e-5)
            solved.append(answer)
    spread = torch.stack(solved).std(0)
    assert (spread > 1e-3).all() if layerwise else (spread < 1e-4).all()
    assert all(((a > -1e-3) & (a < 1 + 1e-3)).all() for a in solved)


def test_entropy_is_that_of_the_predictions() -> None:
    told, state = known(), experts()[0]
    task = tasks("bert")["one"]
    with torch.no_grad():
        found = float(entropy(told, state, "one", task.train.inputs))
        p = task.logits(features("bert", state, task.train.inputs)).softmax(1).double().numpy()
    assert found == pytest.approx(float(-(p * np.log(p)).sum(1).mean()), rel=1e-5)


# --- NeuLig ---------------------------------------------------------------------------------------


def test_neulig_weighs_the_members_that_answer_right() -> None:
    """The labels are what the second member answers: its weight must grow, and sum to 1."""
    told, members = known(count=3), experts(count=3, size=0.3)
    for name, task in list(told._tasks.items()):
        with torch.no_grad():
            labels = task.logits(features("bert", members[1], task.train.inputs)).argmax(1)
        split = Split(task.train.inputs, labels)
        told._tasks[name] = Task(name, task.classes, split, split, split, task.head, task.scale)
    found = NeuLig(per_class=ROWS).prepare(told.base, members, told, generator())(
        Setting((1.0, 1.0, 1.0))
    )
    key = "encoder.layer.0.intermediate.dense.weight"
    taus = torch.stack([(m[key] - told.base[key]).flatten() for m in members], 1).double()
    moved = (found[key] - told.base[key]).flatten().double()
    w = torch.linalg.lstsq(taus, moved[:, None]).solution[:, 0]
    assert float(w.sum()) == pytest.approx(1, abs=1e-3)
    assert float(w[1]) > 0.5
    assert (w > -1e-3).all()


# --- ProDistill -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_alone_does_what_it_does_in_the_model(name: str) -> None:
    told = known(name)
    order = layers(told.anatomy)
    inputs = {key: value[:4] for key, value in tasks(name)["one"].train.inputs.items()}
    seen = calls(told, told.base, inputs, order)
    for layer in order:
        tensors = {k: v for k, v in told.base.items() if k.startswith(f"{layer}.")}
        assert seen[layer]
        for call in seen[layer]:
            alone = run(tiny(name)[0].get_submodule(layer), layer, tensors, call)
            torch.testing.assert_close(alone, call.output, rtol=1e-4, atol=1e-4)
            # Again: nothing was kept from one call to the next.
            again = run(tiny(name)[0].get_submodule(layer), layer, tensors, call)
            assert torch.equal(again, alone)


def test_layers_hold_whole_blocks() -> None:
    assert layers(Anatomy.of(tiny("bert")[0])) == ["encoder.layer.0", "encoder.layer.1"]
    # Relative positions are computed in the first block and handed on.
    assert layers(Anatomy.of(tiny("t5")[0]))[:2] == ["encoder.block.0", "encoder.block.1"]
    assert layers(Anatomy("plane", (), ())) == []


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_prodistill_brings_every_layer_nearer_to_the_experts(name: str) -> None:
    told, members = known(name), experts(name, size=0.3)
    order = layers(told.anatomy)
    method = ProDistill(per_task=ROWS, steps=25, rate=0.03)
    found = method.prepare(told.base, members, told, generator())(Setting((1.0, 1.0)))
    start = merger("task-arithmetic").method.merge(
        told.base, members, Setting((0.3, 0.3)), None, generator()
    )

    def gaps(state: State) -> list[float]:
        out = []
        for layer in order:
            total = 0.0
            for task, member in zip(("one", "two"), members, strict=True):
                inputs = tasks(name)[task].train.inputs
                own, wanted = (calls(told, s, inputs, [layer])[layer] for s in (state, member))
                total += sum(
                    float((a.output - b.output).square().sum())
                    for a, b in zip(own, wanted, strict=True)
                )
            out.append(total)
        return out

    for before, after in zip(gaps(start), gaps(found), strict=True):
        assert after < 0.8 * before
    # Outside the layers: 0.3 of every τ.
    outside = [key for key in found if not key.startswith(tuple(f"{layer}." for layer in order))]
    for key in outside:
        torch.testing.assert_close(found[key], start[key])
    # One coefficient per entry: no single λ explains a tensor.
    key = f"{order[0]}." + ("intermediate.dense.weight" if name == "bert" else "mlp.fc1.weight")
    key = key if key in found else told.anatomy.mlp[0].up.weight.key
    taus = torch.stack([(m[key] - told.base[key]).flatten() for m in members], 1)
    moved = (found[key] - told.base[key]).flatten()
    answer = torch.linalg.lstsq(taus, moved[:, None]).solution[:, 0]
    assert (taus @ answer - moved).norm() > 0.05 * moved.norm()


def test_prodistill_needs_layers() -> None:
    told = known()
    told.anatomy = Anatomy("none", (), ())
    with pytest.raises(MethodError, match="needs attention or MLP blocks"):
        ProDistill().merge(told.base, experts(), Setting((1.0, 1.0)), told, generator())
