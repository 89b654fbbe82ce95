"""Ours against FusionBench (extra ``[fusionbench]``): TIES over the whole model, TSV-M, Iso-C,
and what RegMean and Fisher do with their statistics."""

from __future__ import annotations

import warnings

import pytest
import torch
from plane import PLANE, TASKS
from test_mergers import run
from zoo import generator, perturbed

from benchmark.api.contracts import Access, Knowledge, Setting
from benchmark.api.methods import merger
from benchmark.core.state import State, task_vector
from benchmark.merging import fisher as ours_fisher
from benchmark.merging.regmean import RegMean

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its libraries' own, on import
    pytest.importorskip(
        "fusion_bench", reason="pip install 'unmergebench[fusionbench]'", exc_type=ImportError
    )
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
        compute_and_sum_svd_mem_reduction,
    )
    from fusion_bench.method.ties_merging import ties_merging_utils as ties

DENSITY = 0.2
EQUAL = (1.0, 1.0, 1.0)


def models() -> tuple[State, list[State]]:
    rng = generator(0)
    shapes = {"a.weight": (24, 18), "a.bias": (24,), "b.weight": (12, 24), "b.bias": (12,)}
    base = {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    return base, [perturbed(base, 0.1, seed) for seed in (1, 2, 3)]


def close(ours: State, base: State, theirs: State) -> None:
    for key, tau in theirs.items():
        expected = base[key] + tau
        gap = float((ours[key] - expected).abs().max() / expected.abs().max())
        assert gap <= 1e-6, f"{key}: {gap:.1e}"


@pytest.mark.parametrize(("rule", "normalize"), [("sum", "false"), ("mean", "true")])
def test_ties_over_the_whole_model(rule: str, normalize: str) -> None:
    base, experts = models()
    flat = torch.stack([ties.state_dict_to_vector(task_vector(e, base)) for e in experts])
    merged = ties.ties_merging(flat, reset_thresh=DENSITY, merge_func=rule)
    ours = run(
        f"ties(scope=global, density={DENSITY}, normalize={normalize})", base, experts, EQUAL
    )
    step = ties.state_dict_to_vector({key: ours[key] - base[key] for key in base})
    # It keeps one entry more per member: the greatest of those that we drop.
    rank = flat.shape[1] - int(DENSITY * flat.shape[1])
    last = (flat.abs() == flat.abs().kthvalue(rank, dim=1, keepdim=True).values).any(0)
    assert int(last.sum()) <= len(experts)
    assert (merged != 0).sum() > 0.2 * flat.shape[1]
    torch.testing.assert_close(step[~last], merged[~last], rtol=0, atol=1e-6)


def test_tsv() -> None:
    base, experts = models()
    taus = [task_vector(expert, base) for expert in experts]
    theirs = compute_and_sum_svd_mem_reduction(taus, accelerator="cpu")
    close(run("tsv", base, experts, EQUAL), base, theirs)


def test_iso_c() -> None:
    base, experts = models()
    taus = [task_vector(expert, base) for expert in experts]
    close(run("iso-c", base, experts, EQUAL), base, iso_c(taus, accelerator="cpu"))


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
def test_regmean(alpha: float) -> None:
    _, experts = models()
    rng = generator(7)
    inputs = [torch.randn(60, 18, generator=rng, dtype=torch.float64) for _ in experts]
    grams = [x.T @ x for x in inputs]
    own = [expert["a.weight"].double() for expert in experts]
    theirs = merging_with_regmean_weights(
        {"a.weight": own}, [{"a": gram} for gram in grams], reduce_non_diagonal_ratio=alpha
    )["a.weight"]
    torch.testing.assert_close(RegMean()._solve(own, grams, alpha), theirs, rtol=1e-6, atol=1e-7)


def test_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models()[0], models()[1][:2]
    rng = generator(8)
    found = [{k: torch.rand(v.shape, generator=rng) for k, v in base.items()} for _ in experts]
    given = iter(found)
    monkeypatch.setattr(ours_fisher, "fisher", lambda *arguments: next(given))
    knowledge = Knowledge(Access.UNLABELED, base, (), PLANE.anatomy(), tasks=TASKS)
    setting = Setting((0.35, 0.65))
    # Floors differ (theirs is added before the norms, ours is a least weight): next to none here.
    merged = merger("fisher(floor=1e-30)").method.merge(base, experts, setting, knowledge, rng)
    theirs = merging_with_fisher_weights(
        {key: [expert[key] for expert in experts] for key in base},
        found, torch.tensor(setting.coefficients), minimal_fisher_weight=1e-30,
    )  # fmt: skip
    for key, value in theirs.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6)
