"""KnOTS and Core: their formulas on small matrices, and what a shared basis must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_mergers import assert_close, assert_equal, coefficient, double, quick, run, seeds
from zoo import generator, state_of, tiny

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Access, Knowledge, Setting
from benchmark.api.methods import defense, merger, testbed
from benchmark.api.recipe import Lora
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.lowrank import rounding, thin_svd
from benchmark.core.state import State, norm, task_vector
from benchmark.pipeline.store import Store
from benchmark.pipeline.workbench import Workbench
from defenses.mergelock import MergeLock

Array = NDArray[np.float64]
NAMES = ("knots", "core")
PLAIN = [f"{name}(inner=task-arithmetic)" for name in NAMES]
ROWS, COLUMNS = 14, 10


def loras(seed: int, rank: int, count: int = 2) -> tuple[State, list[State]]:
    """A base, and experts whose matrix moved by B·A of ``rank`` and whose vector moved too."""
    rng = generator(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    base = {"w": draw(ROWS, COLUMNS), "b": draw(ROWS), "frozen": draw(5, 5)}
    experts = [
        base
        | {
            "w": base["w"] + 0.2 * draw(ROWS, rank) @ draw(rank, COLUMNS),
            "b": base["b"] + 0.1 * draw(ROWS),
        }
        for _ in range(count)
    ]
    return base, experts


ranks = st.integers(1, COLUMNS)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(seed=seeds, rank=ranks)
def test_one_expert_at_coefficient_one_is_itself(name: str, seed: int, rank: int) -> None:
    base, experts = loras(seed, rank)
    for spec in (f"{name}(inner=task-arithmetic)", f"{name}(density=1)"):
        merged = run(spec, base, experts, (1.0, 0.0))
        assert_close(merged, experts[0])
        assert merged["frozen"] is base["frozen"]


@pytest.mark.parametrize("spec", PLAIN)
@quick
@given(seed=seeds, rank=ranks, a=coefficient, b=coefficient)
def test_task_arithmetic_in_a_shared_basis_is_task_arithmetic(
    spec: str, seed: int, rank: int, a: float, b: float
) -> None:
    """The basis holds every update: no information is lost, whatever the rank."""
    base, experts = loras(seed, rank)
    expected = run("task-arithmetic", base, experts, (a, b))
    assert_close(run(spec, base, experts, (a, b)), expected)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(seed=seeds, rank=st.integers(1, 4))
def test_ties_in_a_shared_basis_is_another_ties(name: str, seed: int, rank: int) -> None:
    base, experts = loras(seed, rank)
    merged = run(name, base, experts, (1.0, 1.0))
    plain = run("ties", base, experts, (1.0, 1.0))
    apart = task_vector({"w": merged["w"]}, {"w": plain["w"]})
    assert norm(apart) > 0.01 * norm(task_vector({"w": plain["w"]}, {"w": base["w"]}))
    # The basis is of the sum of the ranks: so is the merge, which plain TIES' is not.
    assert len(thin_svd(merged["w"] - base["w"], rounding(merged["w"], base["w"]))[1]) <= 2 * rank


def trimmed(values: list[Array], density: float) -> list[Array]:
    """TIES' trimming of one flat vector per member."""
    kept = []
    for value in values:
        cut = np.sort(np.abs(value))[::-1][max(1, int(density * len(value))) - 1]
        kept.append(np.where(np.abs(value) >= cut, value, 0))
    return kept


def elected(values: list[Array]) -> Array:
    """TIES' disjoint sum, at coefficients 1."""
    sign = np.where(sum(values) >= 0, 1.0, -1.0)
    return sum((np.where(np.sign(value) == sign, value, 0) for value in values), np.zeros(()))


@quick
@given(seed=seeds, rank=st.integers(1, 4), density=st.sampled_from([0.2, 0.5, 1.0]))
def test_knots_by_the_textbook(seed: int, rank: int, density: float) -> None:
    base, experts = loras(seed, rank)
    for expert in experts:
        expert["b"] = base["b"]  # global trimming counts what moved: the matrix alone
    deltas = [double(e["w"]) - double(base["w"]) for e in experts]
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    u, s, vt = u[:, : 2 * rank], s[: 2 * rank], vt[: 2 * rank]
    parts = [s[:, None] * vt[:, :COLUMNS], s[:, None] * vt[:, COLUMNS:]]
    flat = elected(trimmed([part.reshape(-1) for part in parts], density))
    expected = double(base["w"]) + u @ flat.reshape(2 * rank, COLUMNS)
    merged = run(f"knots(density={density})", base, experts, (1.0, 1.0))
    np.testing.assert_allclose(double(merged["w"]), expected, atol=1e-4)


@quick
@given(seed=seeds, rank=st.integers(1, 4), density=st.sampled_from([0.2, 0.5, 1.0]))
def test_core_by_the_textbook(seed: int, rank: int, density: float) -> None:
    """With the paper's rotations of each task's own core matrix, spelt out."""
    base, experts = loras(seed, rank)
    b_parts, a_parts = [], []
    for expert in experts:
        u, s, vt = np.linalg.svd(double(expert["w"]) - double(base["w"]))
        b_parts.append(u[:, :rank] * np.sqrt(s[:rank]))
        a_parts.append(np.sqrt(s[:rank])[:, None] * vt[:rank])
    outputs = np.linalg.svd(np.concatenate(b_parts, axis=1), full_matrices=False)[0]
    inputs = np.linalg.svd(np.concatenate(a_parts), full_matrices=False)[2]
    cores = []
    for b, a in zip(b_parts, a_parts, strict=True):
        ub, sb, vb = np.linalg.svd(b, full_matrices=False)
        ua, sa, va = np.linalg.svd(a, full_matrices=False)
        own = np.diag(sb) @ vb @ ua @ np.diag(sa)
        cores.append((outputs.T @ ub) @ own @ (va @ inputs.T))
    flat = elected(trimmed([core.reshape(-1) for core in cores], density))
    expected = double(base["w"]) + outputs @ flat.reshape(cores[0].shape) @ inputs
    merged = run(f"core(density={density})", base, experts, (1.0, 1.0))
    np.testing.assert_allclose(double(merged["w"]), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_only_one_member_made(name: str) -> None:
    base, (one, two) = loras(5, 2)
    two = {**two, "w": base["w"]}
    for spec in (f"{name}(inner=task-arithmetic)", f"{name}(density=1)"):
        merged = run(spec, base, [one, two], (0.5, 1.0))
        expected = double(base["w"]) + 0.5 * (double(one["w"]) - double(base["w"]))
        np.testing.assert_allclose(double(merged["w"]), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_searches_are_those_of_the_inner_merger(name: str) -> None:
    grid = "fixed=0.3, grid=(0.5, 1.0), shared=(0.3,)"
    for count in (2, 4):
        for inner in ("task-arithmetic", "ties"):
            found = merger(f"{name}(inner={inner}, {grid})").method.search_space(count)
            assert found == merger(f"{inner}({grid})").method.search_space(count)
    settings = merger(f"{name}(normalize=true)").method.search_space(2)
    assert all(setting.parameters for setting in settings)
    base, experts = loras(1, 2)
    big = Setting((1.0, 1.0), {"scale": 2.0})
    small = Setting((1.0, 1.0), {"scale": 1.0})
    merge = merger(f"{name}(normalize=true)").method.prepare(base, experts, None, generator(0))
    twice, once = (merge(s)["w"] - base["w"] for s in (big, small))
    torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=1e-4)
    for wrong in ("density=0", "inner=slerp", "normalize=true, per=layer"):
        with pytest.raises(UsageError):
            merger(f"{name}({wrong})")


@pytest.mark.parametrize("architecture", ["open-clip", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_projections_are_taken_apart(name: str, architecture: str) -> None:
    """With the anatomy, Q, K and V in one tensor have bases of their own; so have transposed ones.

    The merge of the value projection is then that of value projections alone.
    """
    model = tiny(architecture)[0]
    base, anatomy = state_of(model), Anatomy.of(model)
    slots = anatomy.attention[0].linears()
    experts = []
    for seed in (1, 2):
        expert, rng = dict(base), generator(seed)
        for letter in ("q", "k", "v"):
            weight = slots[letter].weight.read(base)
            n, m = weight.shape
            step = torch.randn(n, 2, generator=rng) @ torch.randn(2, m, generator=rng)
            slots[letter].weight.write(expert, weight + 0.1 * step)
        experts.append(expert)
    knowledge = Knowledge(Access.WEIGHTS, base, experts, anatomy)
    method = merger(f"{name}(scope=tensor)").method
    setting = Setting((1.0, 1.0))
    merged = method.merge(base, experts, setting, knowledge, generator(0))
    value = slots["v"].weight
    alone = [{"v": value.read(state)} for state in (base, *experts)]
    expected = run(f"{name}(scope=tensor)", alone[0], alone[1:], (1.0, 1.0))
    torch.testing.assert_close(value.read(merged), expected["v"], atol=1e-5, rtol=1e-4)
    blind = method.merge(base, experts, setting, None, generator(0))
    assert not torch.allclose(value.read(blind), value.read(merged), atol=1e-4)
    assert_equal({k: v for k, v in merged.items() if k != value.key}, _rest(base, value.key))


def _rest(state: State, key: str) -> State:
    return {k: v for k, v in state.items() if k != key}


def test_rounding_is_no_rank() -> None:
    """Merged into float32 weights and taken out again, an update keeps its rank."""
    rng = generator(0)
    for size in (64, 256):
        weight = 0.05 * torch.randn(size, 2 * size, generator=rng)
        step = 0.01 * torch.randn(size, 8, generator=rng) @ torch.randn(8, 2 * size, generator=rng)
        moved = weight + step
        assert len(thin_svd(moved - weight, rounding(moved, weight))[1]) == 8
        assert len(thin_svd(moved - weight)[1]) == size


# Experts that are adapters


@pytest.fixture(scope="module")
def bench(home: Path) -> Iterator[Workbench]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("UNMERGEBENCH_CACHE", str(home))
        named = testbed("digits(lora=4, steps=40)")
        yield Workbench(named, torch.device("cpu"), Store(home / "store"))


def released(bench: Workbench, spec: str, victim: str = "mnist-low") -> tuple[State, float]:
    """The release, and its test accuracy."""
    state = bench.released(defense(spec), victim, 0).state()
    rows = range(len(bench.evaluator.task(victim).test))
    return state, float(bench.evaluator.correct(state, victim, "test", rows).mean())


def spectrum(state: State, base: State) -> dict[str, int]:
    """The rank of every tensor that moved (-1: no matrix)."""
    tau = task_vector(state, base)
    return {
        key: len(thin_svd(delta, rounding(state[key], base[key]))[1]) if delta.ndim == 2 else -1
        for key, delta in tau.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["none", "trap2(weight=0.01, adapter=lora)"])
def test_experts_and_traps_are_adapters(spec: str, bench: Workbench) -> None:
    state, accuracy = released(bench, spec)
    base = bench.evaluator.base
    found = spectrum(state, base)
    assert set(found.values()) == {4}
    assert len(found) == 4 * len(bench.anatomy.attention)
    assert accuracy > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["params", "mergelock"])
def test_a_lock_on_the_adapter_alone_loses_what_a_lock_on_the_model_keeps(
    lock: str, bench: Workbench
) -> None:
    base = bench.evaluator.base
    _, expert = released(bench, "none")
    _, whole = released(bench, lock)
    state, alone = released(bench, f"{lock}(adapter_only=true)")
    assert whole == pytest.approx(expert, abs=0.005)
    assert alone < expert - 0.05
    assert set(spectrum(state, base).values()) == {4}
    assert not defense(f"{lock}(adapter_only=true)").method.card.exact
    assert defense(lock).method.card.exact


@pytest.mark.slow
def test_a_lock_on_the_adapter_alone_is_undone_with_its_key_and_the_base(bench: Workbench) -> None:
    base, expert = bench.evaluator.base, bench.expert("mnist-low").state()
    lock = MergeLock(adapter_only=True)
    locked = lock.protect(bench.owner("none", "mnist-low"), generator(3))
    back = lock.unlock(locked, bench.anatomy, generator(3), base)
    assert_close(back, expert, 1e-4)
    assert norm(task_vector(back, locked)) > 0.1
    with pytest.raises(MethodError, match="give base"):
        lock.unlock(locked, bench.anatomy, generator(3))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["task-arithmetic", "ties", *NAMES])
def test_merges_of_adapters_know_both_tasks(spec: str, bench: Workbench) -> None:
    tasks = ("mnist-low", "mnist-high")
    base = bench.evaluator.base
    experts = [bench.expert(task).state() for task in tasks]
    knowledge = Knowledge(Access.WEIGHTS, base, experts, bench.anatomy)
    setting = Setting((1.0, 1.0))
    merged = merger(spec).method.merge(base, experts, setting, knowledge, generator(0))
    for task in tasks:
        rows = range(len(bench.evaluator.task(task).test))
        right = bench.evaluator.correct(merged, task, "test", rows).mean()
        before = bench.evaluator.correct(base, task, "test", rows).mean()
        assert right > before + 0.2
    if spec != "ties":
        assert set(spectrum(merged, base).values()) <= set(range(1, 9))


def test_the_rank_of_a_testbed() -> None:
    full, small = testbed("digits").method, testbed("digits(lora=4)").method
    assert full.recipe.lora is None
    assert small.recipe.lora == Lora(4, 4)
    assert small.recipe.learning_rate == pytest.approx(10 * full.recipe.learning_rate)
    assert small.recipe.adapted(None) == full.recipe
    assert full.content_hash() != small.content_hash()
    assert testbed("minilm(lora=16)").method.recipe.lora == Lora(16, 16)
    with pytest.raises(UsageError, match="lora is a rank"):
        testbed("digits(lora=-1)")
