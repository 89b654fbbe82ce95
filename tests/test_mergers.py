"""Mergers: the formulas, and what must hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import state_of, tiny

from benchmark.api.contracts import Access, Setting
from benchmark.api.methods import MERGERS, merger
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State, compatible, digest, task_vector
from benchmark.merging.dare import drop

SPECS = [
    "average",
    "task-arithmetic",
    "ties",
    "ties(scope=tensor)",
    "ties(normalize=true)",
    "dare",
    "dare-ties",
    "slerp",
]
#: Covered by test_more_mergers, the last two by test_adapter_mergers.
ELSEWHERE = (
    "breadcrumbs", "consensus", "della", "model-stock", "tsv", "iso-c", "cart", "mdm-oc", "knots",
    "core",
)  # fmt: skip
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
coefficient = st.floats(0.1, 1.5).map(lambda c: round(c, 3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_base(seed: int, dtype: torch.dtype = torch.float32) -> State:
    rng = generator(seed)
    return {
        "w": torch.randn(12, 10, generator=rng).to(dtype),
        "b": torch.randn(10, generator=rng).to(dtype),
        "scalar": torch.randn((), generator=rng).to(dtype),
        "frozen": torch.randn(20, 5, generator=rng).to(dtype),
        "ids": torch.arange(7),
    }


def random_expert(base: State, seed: int, size: float = 0.1) -> State:
    rng = generator(seed)
    moved = {
        key: base[key] + (size * torch.randn(base[key].shape, generator=rng)).to(base[key].dtype)
        for key in ("w", "b", "scalar")
    }
    return {**base, **moved}


def members(seed: int, count: int, size: float = 0.1) -> tuple[State, list[State]]:
    base = random_base(seed)
    return base, [random_expert(base, seed + 1 + i, size) for i in range(count)]


def run(
    spec: str, base: State, experts: list[State], coefficients: tuple[float, ...], seed: int = 0
) -> State:
    return merger(spec).method.merge(base, experts, Setting(coefficients), None, generator(seed))


def assert_close(merged: State, expected: State, tolerance: float = 1e-5) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=tolerance, atol=tolerance, msg=key)


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def double(value: Tensor) -> np.ndarray:
    return value.double().numpy()


# What holds for every merger


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merged_state_can_stand_in_for_the_base(spec: str, dtype: torch.dtype) -> None:
    base = random_base(0, dtype)
    experts = [random_expert(base, 1), random_expert(base, 2)]
    before = [digest(state) for state in (base, *experts)]
    merged = run(spec, base, experts, (0.7, 0.4))
    compatible(merged, base, "merged")
    assert merged["frozen"] is base["frozen"]  # nobody moved it: shared, not copied
    assert merged["ids"] is base["ids"]
    assert not torch.equal(merged["w"], base["w"])
    assert [digest(state) for state in (base, *experts)] == before


@pytest.mark.parametrize("spec", SPECS)
@quick
@given(seed=seeds, out=st.integers(0, 2), a=coefficient, b=coefficient)
def test_coefficient_zero_is_leaving_out(
    spec: str, seed: int, out: int, a: float, b: float
) -> None:
    base, experts = members(seed, 3)
    coefficients = [a, b]
    coefficients.insert(out, 0.0)
    with_it = run(spec, base, experts, tuple(coefficients), seed)
    without = run(spec, base, experts[:out] + experts[out + 1 :], (a, b), seed)
    assert_equal(with_it, without)


@pytest.mark.parametrize("spec", SPECS)
def test_leaving_out_down_to_one_and_none(spec: str) -> None:
    base, experts = members(3, 2)
    assert_equal(run(spec, base, experts, (0.0, 0.4)), run(spec, base, experts[1:], (0.4,)))
    assert_equal(run(spec, base, experts, (0.0, 0.0)), base)


@pytest.mark.parametrize("spec", SPECS)
def test_prepare_equals_merge_in_any_order(spec: str) -> None:
    base, experts = members(5, 2)
    method = merger(spec).method
    space = method.search_space(2)
    direct = [method.merge(base, experts, setting, None, generator(9)) for setting in space]
    prepared = method.prepare(base, experts, None, generator(9))
    backwards = [prepared(setting) for setting in reversed(space)][::-1]
    for one, other in zip(direct, backwards, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("spec", SPECS)
def test_seed_matters_where_the_class_says_so(spec: str) -> None:
    base, experts = members(6, 2)
    first = run(spec, base, experts, (1.0, 1.0), seed=1)
    assert_equal(first, run(spec, base, experts, (1.0, 1.0), seed=1))
    changed = digest(first) != digest(run(spec, base, experts, (1.0, 1.0), seed=2))
    assert changed == merger(spec).method.stochastic


@pytest.mark.parametrize(
    "spec",
    [
        "average",
        "task-arithmetic",
        "ties(density=1)",
        "ties(density=1, normalize=true)",
        "dare(density=1)",
        "dare-ties(density=1)",
        "slerp",
    ],
)
@quick
@given(seed=seeds, share=st.floats(0.05, 0.95))
def test_merge_of_equal_models_is_that_model(spec: str, seed: int, share: float) -> None:
    """For coefficients that sum to one, and methods that drop nothing of τ."""
    base, (expert,) = members(seed, 1)
    assert_close(run(spec, base, [expert, dict(expert)], (share, 1 - share)), expert)


def test_wrong_number_of_coefficients() -> None:
    base, experts = members(0, 2)
    with pytest.raises(MethodError, match="3 coefficients for 2 models"):
        run("task-arithmetic", base, experts, (1.0, 1.0, 1.0))


# The formulas


@quick
@given(seed=seeds, a=coefficient, b=coefficient)
def test_task_arithmetic_and_average_formulas(seed: int, a: float, b: float) -> None:
    base, (one, two) = members(seed, 2)
    merged = run("task-arithmetic", base, [one, two], (a, b))
    mean = run("average", base, [one, two], (a, b))
    for key in ("w", "b", "scalar"):
        zero, first, second = (double(s[key]) for s in (base, one, two))
        expected = zero + a * (first - zero) + b * (second - zero)
        np.testing.assert_allclose(double(merged[key]), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(double(mean[key]), (first + second) / 2, rtol=1e-5, atol=1e-5)


def test_task_arithmetic_on_a_real_architecture() -> None:
    base = state_of(tiny("bert")[0])
    rng = generator(1)
    one, two = (
        {
            key: value + 0.01 * torch.randn(value.shape, generator=rng)
            if value.is_floating_point()
            else value
            for key, value in base.items()
        }
        for _ in range(2)
    )
    merged = run("task-arithmetic", base, [one, two], (0.4, 1.0))
    key = next(key for key in base if key.endswith("weight") and ".0." in key)
    zero = double(base[key])
    expected = zero + 0.4 * (double(one[key]) - zero) + (double(two[key]) - zero)
    np.testing.assert_allclose(double(merged[key]), expected, rtol=1e-5, atol=1e-6)


def naive_ties(
    base: State,
    experts: list[State],
    coefficients: tuple[float, ...],
    density: float,
    scope: str,
    normalize: bool,
    scale: float,
) -> dict[str, np.ndarray]:
    """The definition, by sorting, one entry at a time."""
    keys = [key for key, value in base.items() if value.is_floating_point()]
    trimmed = []
    for expert in experts:
        tau = {key: double(expert[key] - base[key]) for key in keys}
        groups = [keys] if scope == "global" else [[key] for key in keys]
        kept = {}
        for group in groups:
            flat = np.concatenate([tau[key].reshape(-1) for key in group])
            count = max(1, int(density * len(flat)))
            cut = sorted(abs(flat), reverse=True)[count - 1]
            kept.update({key: np.where(abs(tau[key]) >= cut, tau[key], 0.0) for key in group})
        trimmed.append(kept)
    out = {}
    for key in keys:
        merged = np.zeros(base[key].numel())
        columns = [c * t[key].reshape(-1) for c, t in zip(coefficients, trimmed, strict=True)]
        for i in range(len(merged)):
            entries = [column[i] for column in columns]
            sign = 1 if sum(entries) >= 0 else -1
            agree = [j for j, entry in enumerate(entries) if np.sign(entry) == sign]
            merged[i] = sum(entries[j] for j in agree)
            if normalize and agree:
                merged[i] /= sum(coefficients[j] for j in agree)
        out[key] = double(base[key]) + scale * merged.reshape(base[key].shape)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    count=st.integers(1, 4),
    density=st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]),
    scope=st.sampled_from(["global", "tensor"]),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.4]),
    data=st.data(),
)
def test_ties_against_the_definition(
    seed: int,
    count: int,
    density: float,
    scope: str,
    normalize: bool,
    scale: float,
    data: st.DataObject,
) -> None:
    base, experts = members(seed, count)
    coefficients = tuple(data.draw(st.tuples(*[coefficient] * count)))
    spec = f"ties(density={density}, scope={scope}, normalize={normalize}, scale={scale})"
    merged = run(spec, base, experts, coefficients)
    expected = naive_ties(base, experts, coefficients, density, scope, normalize, scale)
    for key, value in expected.items():
        np.testing.assert_allclose(double(merged[key]), value, rtol=1e-5, atol=2e-6, err_msg=key)


def test_ties_is_not_one_method() -> None:
    base, experts = members(0, 2)
    experts[0]["b"] = base["b"] + 10 * (experts[0]["b"] - base["b"])  # tensors of unequal size
    variants = ["", "(scope=tensor)", "(normalize=true)", "(density=0.5)", "(scale=0.5)"]
    assert len({digest(run("ties" + v, base, experts, (1.0, 0.5))) for v in variants}) == 5


def test_ties_keeps_the_share_of_entries_it_says() -> None:
    base, experts = members(0, 1)
    floats = sum(value.numel() for value in base.values() if value.is_floating_point())
    merged = run("ties(density=0.3)", base, experts, (1.0,))
    kept = sum(int((merged[key] != base[key]).sum()) for key in ("w", "b", "scalar"))
    assert kept == int(0.3 * floats)


def test_dare_keeps_or_drops_entries_and_is_unbiased() -> None:
    base, (expert,) = members(2, 1)
    tau = task_vector(expert, base)["w"]
    total = torch.zeros_like(tau)
    for seed in range(400):
        kept = drop({"w": tau}, 0.25, seed)["w"]
        assert torch.equal(kept[kept != 0], (tau / 0.25)[kept != 0])
        total += kept
    # Standard error of each entry's mean: |τ|·sqrt((1 − p)/p / n) with p = 0.25, n = 400.
    error = ((total / 400 - tau) / (tau.abs() * (3 / 400) ** 0.5)).abs()
    assert float(error.max()) < 5
    assert float(error.mean()) == pytest.approx((2 / np.pi) ** 0.5, abs=0.2)


def test_dare_members_are_dropped_independently() -> None:
    base = random_base(0)
    one, two = random_expert(base, 1), random_expert(base, 2)
    kept = [drop(task_vector(e, base), 0.5, 0)["w"] != 0 for e in (one, two)]
    assert 0.3 < float((kept[0] == kept[1]).float().mean()) < 0.7


@quick
@given(seed=seeds, t=st.floats(0.05, 0.95), size=st.sampled_from([0.001, 1.0, 5.0]))
def test_slerp_formula(seed: int, t: float, size: float) -> None:
    base, (one, two) = members(seed, 2, size)
    merged = run("slerp", base, [one, two], (1 - t, t))
    for key in ("w", "b", "scalar"):
        a, b = double(one[key]), double(two[key])
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        s0, s1 = 1 - t, t
        if abs(cosine) <= 0.9995:
            angle = np.arccos(cosine)
            s0, s1 = (np.sin(s * angle) / np.sin(angle) for s in (s0, s1))
        np.testing.assert_allclose(double(merged[key]), s0 * a + s1 * b, rtol=1e-3, atol=1e-4)


def test_slerp_ends_are_the_members() -> None:
    base, experts = members(1, 2)
    assert_equal(run("slerp", base, experts, (1.0, 0.0)), experts[0])
    assert_equal(run("slerp", base, experts, (0.0, 1.0)), experts[1])


def test_slerp_refuses_other_than_two() -> None:
    base, experts = members(1, 3)
    with pytest.raises(MethodError, match="exactly two"):
        run("slerp", base, experts, (1.0, 1.0, 1.0))
    with pytest.raises(MethodError, match="exactly two"):
        merger("slerp").method.search_space(3)


# What the free-rider searches


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("count", [2, 4])
def test_search_space_fits_its_merger(spec: str, count: int) -> None:
    if spec == "slerp" and count > 2:
        pytest.skip("slerp merges two models")
    base, experts = members(0, count)
    method = merger(spec).method
    space = method.search_space(count)
    assert len({str(setting.to_dict()) for setting in space}) == len(space)
    prepared = method.prepare(base, experts, None, generator())
    assert len({digest(prepared(setting)) for setting in space}) == len(space)
    if spec != "average":
        assert any(setting.coefficients[0] == 0 for setting in space)  # without the victim


def test_task_arithmetic_space() -> None:
    pairs = {s.coefficients for s in merger("task-arithmetic").method.search_space(2)}
    options = (0.0, 0.5, 1.0)
    assert pairs == {(a, b) for a in options for b in options} - {(0.0, 0.0)}
    four = {s.coefficients for s in merger("task-arithmetic").method.search_space(4)}
    assert {(0.3,) * 4, (0.0, 0.3, 0.3, 0.3), (1.0, 0.3, 0.3, 0.3)} <= four
    chosen = merger("task-arithmetic(grid=(0.3, 0.8))").method.search_space(2)
    assert {c for s in chosen for c in s.coefficients} == {0.0, 0.3, 0.8}


@pytest.mark.parametrize(
    "spec",
    [
        "ties(density=0)",
        "ties(density=1.5)",
        "ties(scope=layer)",
        "ties(scale=1e999)",
        "dare(density=0)",
        "slerp(grid=(0.5, 2))",
        "task-arithmetic(grid=())",
    ],
)
def test_out_of_range(spec: str) -> None:
    with pytest.raises(UsageError):
        merger(spec)


@pytest.mark.parametrize("name", MERGERS.names())
def test_cards_are_complete(name: str) -> None:
    merger = MERGERS.get(name)
    assert merger.card.summary
    assert "/" in name or merger.card.role == "reference" or merger.card.paper
    # Those that know more have tests of their own: test_data_mergers, test_task_aware.
    knows = merger.access > Access.WEIGHTS or merger.task_aware
    tested = {*ELSEWHERE, *(spec.split("(")[0] for spec in SPECS)}
    assert "/" in name or knows or name in tested


def test_a_fixed_coefficient_is_shared_by_all_members() -> None:
    for members in (2, 4):
        space = merger("task-arithmetic(fixed=0.3)").method.search_space(members)
        assert [s.coefficients for s in space] == [
            (0.3,) * members,
            (0.0, *(0.3,) * (members - 1)),
        ]
