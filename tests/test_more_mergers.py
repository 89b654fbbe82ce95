"""Breadcrumbs, consensus, DELLA, Model Stock and spectral mergers by independent arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_mergers import ELSEWHERE, assert_close, assert_equal, double, generator, members, run

from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State, compatible, digest, task_vector
from benchmark.merging.della import Della
from benchmark.pipeline import identity

Array = NDArray[np.float64]


def delta(expert: State, base: State, key: str = "w") -> Array:
    return double(expert[key]) - double(base[key])


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_state_can_stand_in_for_the_base(spec: str, dtype: torch.dtype) -> None:
    base, experts = members(0, 2)
    base, *experts = (
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        for state in (base, *experts)
    )
    for expert in experts:
        expert["frozen"], expert["ids"] = base["frozen"], base["ids"]
    before = [digest(state) for state in (base, *experts)]
    merged = run(spec, base, experts, (1.0, 1.0))
    compatible(merged, base, "merged")
    assert merged["frozen"] is base["frozen"]
    assert not torch.equal(merged["w"], base["w"])
    assert [digest(state) for state in (base, *experts)] == before
    assert_equal(merged, run(spec, base, experts, (1.0, 1.0)))


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("count", [2, 4])
def test_every_setting_of_the_search_merges(spec: str, count: int) -> None:
    base, experts = members(3, count)
    method = merger(spec).method
    merge = method.prepare(base, experts, None, generator())
    settings = method.search_space(count)
    assert any(all(setting.coefficients) for setting in settings)
    for setting in settings:
        if sum(map(bool, setting.coefficients)) > 1:
            compatible(merge(setting), base, str(setting))


@pytest.mark.parametrize("count", [2, 4])
def test_consensus_keeps_what_two_tasks_use(count: int) -> None:
    base, experts = members(2, count)
    taus = [delta(expert, base) for expert in experts]
    weights = [0.7, 0.3, 1.0, 0.5][:count]
    merged = run("consensus(lam=0.4)", base, experts, tuple(weights))
    users = np.zeros_like(taus[0])
    for tau in taus:
        users += np.abs(tau) >= 0.4 * np.abs(sum(taus) - tau)
    step = (users >= 2) * sum(c * tau for c, tau in zip(weights, taus, strict=True))
    np.testing.assert_allclose(double(merged["w"]), double(base["w"]) + step, atol=1e-6)
    assert 0.05 < (users < 2).mean() < 0.95
    # Who counts is who is merged; what all may use is task arithmetic.
    assert_close(
        run("consensus(lam=0.4)", base, [experts[0], base], (0.7, 0.0)),
        run("task-arithmetic", base, [experts[0], base], (0.7, 0.0)),
    )
    assert_close(
        run("consensus(lam=0.0)", base, experts, tuple(weights)),
        run("task-arithmetic", base, experts, tuple(weights)),
    )


def test_what_a_setting_gives_is_in_the_key() -> None:
    """A coefficient alone says nothing of λ, which then is the field's."""
    keys = [
        identity.method(merger(f"consensus(lam={lam})").method, search=False) for lam in (0.2, 0.6)
    ]
    assert keys[0] != keys[1]
    base, experts = members(2, 2)
    first, second = (run(f"consensus(lam={lam})", base, experts, (1.0, 1.0)) for lam in (0.2, 0.6))
    assert not torch.equal(first["w"], second["w"])


def test_breadcrumbs_keeps_the_middle() -> None:
    base, (expert,) = members(1, 1)
    merged = run("breadcrumbs(density=0.5, gamma=0.1)", base, [expert], (0.7,))
    tau = delta(expert, base).reshape(-1)
    order = np.argsort(np.abs(tau))
    n = len(tau)
    kept, top = int(0.5 * n), int(0.1 * n)
    mask = np.zeros(n)
    mask[order[n - kept - top : n - top]] = 1
    expected = double(base["w"]).reshape(-1) + 0.7 * mask * tau
    np.testing.assert_allclose(double(merged["w"]).reshape(-1), expected, atol=1e-6)
    assert mask.sum() == kept
    assert_equal(
        run("breadcrumbs(density=1)", base, [expert], (1.0,)),
        run("task-arithmetic", base, [expert], (1.0,)),
    )


def test_della_keeps_large_entries_more_often_and_is_unbiased() -> None:
    base, (expert,) = members(2, 1)
    tau = task_vector(expert, base)["w"]
    p = Della(density=0.5, epsilon=0.3).keep(tau)
    assert float(p.min()) == pytest.approx(0.2)
    assert float(p.max()) == pytest.approx(0.8)
    rows = tau.abs().argsort(1)
    assert bool((p.gather(1, rows).diff(dim=1) > 0).all())
    total, kept, draws = torch.zeros_like(tau), torch.zeros_like(tau), 400
    for seed in range(draws):
        merged = run("della(elect=false, epsilon=0.3)", base, [expert], (1.0,), seed)
        step = merged["w"] - base["w"]
        total += step
        kept += step.abs() > 1e-9
    spread = tau.abs() * ((1 - p) / p).sqrt() / draws**0.5
    assert bool(((total / draws - tau).abs() < 5 * spread + 1e-6).all())
    assert bool(((kept / draws - p).abs() < 5 * (p * (1 - p) / draws).sqrt()).all())


def test_della_l1_restores_the_norm() -> None:
    base, (expert,) = members(2, 1)
    merged = run("della(elect=false, rescale=l1)", base, [expert], (1.0,))
    for key in ("w", "b"):
        before, after = (s[key] - base[key] for s in (expert, merged))
        assert float(after.abs().sum()) == pytest.approx(float(before.abs().sum()), rel=1e-4)
        assert bool((after == 0).any())


def test_model_stock_is_the_papers_ratio() -> None:
    base, experts = members(5, 3)
    merged = run("model-stock", base, experts, (1.0, 1.0, 1.0))
    taus = [delta(e, base).reshape(-1) for e in experts]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [
        taus[i] @ taus[j] / (np.linalg.norm(taus[i]) * np.linalg.norm(taus[j])) for i, j in pairs
    ]
    cosine = np.mean(cosines)
    t = 3 * cosine / (1 + 2 * cosine)
    expected = double(base["w"]).reshape(-1) + t * np.mean(taus, axis=0)
    np.testing.assert_allclose(double(merged["w"]).reshape(-1), expected, atol=1e-6)
    same = run("model-stock", base, [experts[0]] * 2, (1.0, 1.0))
    assert_close(same, experts[0])
    with pytest.raises(MethodError, match="at least two"):
        run("model-stock", base, experts, (1.0, 0.0, 0.0))


def orthogonal(matrix: Array) -> Array:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ v)


def test_tsv_orthogonalises_the_cut_directions() -> None:
    base, experts = members(6, 2)
    merged = run("tsv", base, experts, (0.8, 0.5))
    parts = [np.linalg.svd(delta(e, base), full_matrices=False) for e in experts]
    left = orthogonal(np.concatenate([u[:, :5] for u, _, _ in parts], 1))
    right = orthogonal(np.concatenate([v[:5] for _, _, v in parts]).T).T
    spectrum = np.concatenate([c * s[:5] for c, (_, s, _) in zip((0.8, 0.5), parts, strict=True)])
    expected = double(base["w"]) + (left * spectrum) @ right
    np.testing.assert_allclose(double(merged["w"]), expected, atol=1e-5)


def test_iso_c_has_a_flat_spectrum() -> None:
    base, experts = members(7, 2)
    merged = run("iso-c", base, experts, (0.8, 0.5))
    u, s, v = np.linalg.svd(0.8 * delta(experts[0], base) + 0.5 * delta(experts[1], base),
                            full_matrices=False)  # fmt: skip
    np.testing.assert_allclose(
        double(merged["w"]), double(base["w"]) + s.mean() * (u @ v), atol=1e-5
    )


def cart(base: Array, experts: list[Array], coefficients: list[float], rank: float) -> Array:
    """θ̄ + Σ c_i · LR_r(θ_i − θ̄) in float64; a vector is the average alone (arXiv 2412.12153)."""
    centre = np.mean(experts, axis=0)
    if base.ndim < 2:
        return centre
    out, r = centre.copy(), math.ceil(rank * min(base.shape))
    for c, expert in zip(coefficients, experts, strict=True):
        u, s, v = np.linalg.svd(expert - centre, full_matrices=False)
        out += c * (u[:, :r] * s[:r]) @ v[:r]
    return out


@pytest.mark.parametrize("rank", [0.08, 0.12, 0.3, 0.41, 1.0])  # of 10: 1, 2, 3, 5 and all
@pytest.mark.parametrize(
    "moved",
    [
        (("w", "b", "scalar"),) * 3,
        (("w", "b"), ("b", "scalar"), ("w", "scalar")),  # each tensor is still in one member
        (("w", "b", "scalar"), (), ("w",)),
    ],
    ids=["all move all", "one does not move a tensor", "two do not"],
)
def test_cart_is_its_formula(rank: float, moved: tuple[tuple[str, ...], ...]) -> None:
    base, experts = members(8, 3)
    experts = [
        {**base, **{key: expert[key] for key in keys}}
        for expert, keys in zip(experts, moved, strict=True)
    ]
    coefficients = [0.9, 0.4, 1.3]
    merged = run(f"cart(rank={rank})", base, experts, tuple(coefficients))
    for key in ("w", "b", "scalar", "frozen"):
        expected = cart(double(base[key]), [double(e[key]) for e in experts], coefficients, rank)
        np.testing.assert_allclose(double(merged[key]), expected, atol=1e-5, err_msg=key)


def test_cart_without_a_member_is_cart_of_the_others() -> None:
    base, experts = members(8, 3)
    merged = run("cart(rank=0.3)", base, experts, (0.9, 0.0, 0.4))
    expected = cart(
        double(base["w"]), [double(experts[i]["w"]) for i in (0, 2)], [0.9, 0.4], rank=0.3
    )
    np.testing.assert_allclose(double(merged["w"]), expected, atol=1e-5)


def test_mdm_oc_adds_orthogonal_parts() -> None:
    base, experts = members(9, 3)
    flat = [
        np.concatenate([delta(e, base, key).reshape(-1) for key in ("w", "b", "scalar")])
        for e in experts
    ]
    parts: list[Array] = []
    for tau in flat:
        for part in parts:
            tau = tau - (tau @ part) / (part @ part) * part
        parts.append(tau)
    merged = run("mdm-oc", base, experts, (1.0, 0.5, 0.7))
    expected = parts[0] + 0.5 * parts[1] + 0.7 * parts[2]
    found = np.concatenate([delta(merged, base, key).reshape(-1) for key in ("w", "b", "scalar")])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Unmerging the last member is subtracting its part.
    without = run("mdm-oc", base, experts, (1.0, 0.5, 0.0))
    left = np.concatenate([delta(without, base, key).reshape(-1) for key in ("w", "b", "scalar")])
    np.testing.assert_allclose(left, expected - 0.7 * parts[2], atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["breadcrumbs(density=0)", "breadcrumbs(gamma=1)", "della(epsilon=0.5)", "cart(rank=0)"]
)
def test_out_of_range(spec: str) -> None:
    with pytest.raises(UsageError):
        merger(spec)


# Against the tool a free-rider really uses


@pytest.mark.parametrize(
    ("spec", "method", "options", "coefficients"),
    [
        ("task-arithmetic", "task_arithmetic", {}, (0.7, 0.4)),
        (
            "ties(scope=tensor, density=0.3)",
            "ties",
            {"density": 0.3, "normalize": False},
            (0.7, 0.4),
        ),
        ("ties(scope=tensor, density=0.3, normalize=true)", "ties", {"density": 0.3}, (0.7, 0.4)),
        (
            "breadcrumbs(density=0.6, gamma=0.1)",
            "breadcrumbs",
            {"density": 0.6, "gamma": 0.1},
            (0.7, 0.4),
        ),
        ("model-stock", "model_stock", None, (1.0, 1.0)),
    ],
)
def test_equals_mergekit(
    spec: str, method: str, options: dict[str, object] | None, coefficients: tuple[float, ...]
) -> None:
    pytest.importorskip("mergekit", reason="pip install mergekit")
    from mergekit.merge_methods import merge_state_dicts

    base, experts = members(11, 2)
    floats = [
        {k: v for k, v in state.items() if v.is_floating_point() and v.ndim}
        for state in (base, *experts)
    ]
    names = dict(zip(("base", "a", "b"), floats, strict=True))
    parameters = None
    if options is not None:
        each = {"a": coefficients[0], "b": coefficients[1]}
        parameters = {
            "weight": each,
            **{k: v if isinstance(v, bool) else dict.fromkeys(each, v) for k, v in options.items()},
        }
    with torch.no_grad():
        theirs = merge_state_dicts(names, method, parameters=parameters, base="base")
    ours = run(spec, base, experts, coefficients)
    for key, value in theirs.items():
        scale = float(value.abs().max())
        assert float((ours[key] - value).abs().max()) <= 1e-6 * scale, key


def test_setting_without_victim_ignores_it() -> None:
    base, experts = members(12, 3)
    for spec in ("tsv", "iso-c", "cart", "mdm-oc", "breadcrumbs", "model-stock"):
        merge = merger(spec).method.prepare(base, experts, None, generator())
        others = merger(spec).method.prepare(base, experts[1:], None, generator())
        assert_close(merge(Setting((0.0, 1.0, 1.0))), others(Setting((1.0, 1.0))))
