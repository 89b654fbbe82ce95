"""What a free-rider searches: shared, per-task and per-layer coefficients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_mergers import assert_equal, generator, members, run
from zoo import perturbed, state_of, tiny

from benchmark.api import methods
from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.errors import UsageError
from benchmark.core.records import Cell
from benchmark.io.assets import AssetError
from benchmark.merging.layers import bands
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "open-clip"])
def test_bands_cut_every_tower_by_depth(name: str) -> None:
    state = state_of(tiny(name)[0])
    found = bands(state, 2)
    assert found.keys() == state.keys()
    assert set(found.values()) == {0, 1}
    assert all(band == 0 for key, band in found.items() if ".0." in key)
    assert all(band == 1 for key, band in found.items() if ".1." in key)


def test_unnumbered_tensors_go_with_their_side() -> None:
    found = bands(["tok_embeddings", "h.0.w", "h.1.w", "h.2.w", "b.0.w", "norm.weight"], 3)
    assert list(found.values()) == [0, 0, 1, 2, 0, 2]


@pytest.mark.parametrize("spec", ["task-arithmetic", "ties", "slerp", "tsv", "dare"])
def test_a_setting_by_layer_is_put_together_from_plain_merges(spec: str) -> None:
    base = state_of(tiny("bert")[0])
    experts = [perturbed(base, 0.1, seed) for seed in (1, 2)]
    layers = ((1.0, 0.5), (0.5, 1.0))
    method = merger(spec).method
    merged = method.merge(base, experts, Setting((1.0, 1.0), layers=layers), None, generator())
    lower, upper = (run(spec, base, experts, c) for c in layers)
    band = bands(base, 2)
    assert_equal(merged, {key: (lower, upper)[band[key]][key] for key in base})
    base_below = Setting((1.0, 1.0), layers=((0.0, 0.0), (1.0, 1.0)))
    merged = method.merge(base, experts, base_below, None, generator())
    first = next(key for key in base if ".layer.0." in key)
    assert merged[first] is base[first]


def coefficients(spec: str, count: int) -> list[tuple[float, ...]]:
    return [s.coefficients for s in merger(spec).method.search_space(count)]


def test_what_has_a_coefficient_of_its_own() -> None:
    shared = "task-arithmetic(per=shared, shared=(0.3, 0.8))"
    assert coefficients(shared, 2) == [(0.3, 0.3), (0.8, 0.8), (0.0, 0.3), (0.0, 0.8)]
    task = "task-arithmetic(per=task, grid=(0.5, 1.0))"
    assert len(coefficients(task, 4)) == 3**4 - 1
    assert (0.0, 1.0, 0.5, 1.0) in coefficients(task, 4)
    assert (1.0, 0.3, 0.3) in coefficients("task-arithmetic", 3)
    assert (1.0, 0.3, 0.3) not in coefficients("task-arithmetic(per=shared)", 3)


@pytest.mark.parametrize("count", [2, 4])
def test_settings_by_layer(count: int) -> None:
    spec = "task-arithmetic(per=layer, bands=2, grid=(1.0,), shared=(0.5, 1.0))"
    found = merger(spec).method.search_space(count)
    plain = [s for s in found if not s.layers]
    layered = [s for s in found if s.layers]
    if count == 2:  # 4 rows per band, less those equal in both bands
        assert (len(plain), len(layered)) == (3, 4 * 4 - 4)
    else:  # 2 values per band, with the victim and without
        assert (len(plain), len(layered)) == (4, 2 * (2 * 2 - 2))
        assert all(len({bool(band[0]) for band in s.layers}) == 1 for s in layered)
    assert len({(s.coefficients, s.layers) for s in found}) == len(found)
    for setting in layered:
        assert setting.coefficients == tuple(map(max, zip(*setting.layers, strict=True)))
        assert setting.to_dict()["layers"] == [list(band) for band in setting.layers]
    without = next(s for s in layered if s.coefficients[0] == 0).without_victim()
    assert len(without.coefficients) == len(without.layers[0]) == count - 1


def test_out_of_range() -> None:
    with pytest.raises(UsageError, match="at least 2 bands"):
        merger("task-arithmetic(bands=1)")
    with pytest.raises(UsageError, match="no layers"):
        merger("ensemble(per=layer)")
    with pytest.raises(UsageError, match="normalize=false"):
        merger("ties(per=layer, normalize=true)")


# --- the sweep ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))


def sweep(folder: Path, merger: str, rungs: tuple[int, ...]) -> Cell:
    victim, partner, *_ = methods.testbed("digits").method.tasks
    changed = load("smoke").model_dump() | {
        "groups": [{"victim": victim, "partners": [partner]}],
        "defenses": ("none",), "attacks": ("none",), "mergers": (merger,),
        "validation_rungs": rungs, "test": 100,
    }  # fmt: skip
    device = torch.device("cpu")
    try:
        plan = planning.make(Suite.model_validate(changed), device)
        (cell,) = running.execute(plan, folder, device)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    return cell


@pytest.mark.slow
def test_the_sweep_finds_what_trying_everything_finds(tmp_path: Path) -> None:
    spec = "task-arithmetic(per=layer, bands=2, grid=(0.5, 1.0))"
    raced = sweep(tmp_path / "raced", spec, (4, 8, 16, 32, 64, 100))
    whole = sweep(tmp_path / "whole", spec, (100,))
    assert whole.search.passes == whole.search.exhaustive == raced.search.exhaustive
    assert whole.search.bound == 0
    assert raced.search.passes < whole.search.exhaustive / 5
    assert raced.gain is not None
    assert whole.gain is not None
    assert raced.gain >= whole.gain - raced.search.bound
    assert any(s.layers for s in merger(spec).method.search_space(2))


def test_members_of_no_use_to_a_merge_by_layer() -> None:
    base, experts = members(3, 2)
    setting = Setting((1.0, 0.0), layers=((1.0, 0.0), (0.5, 0.0)))
    merged = merger("task-arithmetic").method.merge(base, experts, setting, None, generator())
    # Its tensors are unnumbered and no embeddings: all belong to the last band.
    assert_equal(merged, run("task-arithmetic", base, experts, (0.5, 0.0)))
