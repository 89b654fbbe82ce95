"""What honest users do to a release, and the tax that shows in the cells."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import outputs, state_of, tiny

from benchmark.api import methods
from benchmark.api.recipe import Lora, Recipe
from benchmark.core.errors import AssetError
from benchmark.core.records import Cell
from benchmark.core.state import ForeignState, State
from benchmark.evaluation import benign
from benchmark.pipeline import benign as taxing
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.measure import Measure
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Suite, load
from benchmark.pipeline.workbench import Workbench

CPU = torch.device("cpu")


def runner(model: nn.Module):  # type: ignore[no-untyped-def]
    """(state, inputs) → outputs of the tiny model."""
    return lambda state, inputs: outputs(model, state, inputs)


# -- State → State ------------------------------------------------------------------------------


def test_int8_computes_what_torchs_dynamic_quantisation_does() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("other kernels keep other activation ranges")
    model, inputs = tiny("vit")
    state = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it goes
        scheme = {nn.Linear: quantization.per_channel_dynamic_qconfig}
        theirs = quantization.quantize_dynamic(copy.deepcopy(model), scheme)
        wanted = _run(theirs, inputs)
    mine = benign.int8(state, model, runner(model))
    assert isinstance(mine, ForeignState)
    found, full = mine.forward(mine, inputs), outputs(model, state, inputs)
    cost = (full - wanted).norm()
    assert cost > 1e-3 * full.norm()  # 8 bits do cost something
    # Equal up to values on the edge between two steps, which float32 rounding may tip.
    assert (found - wanted).norm() < 0.1 * cost


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """As ``outputs`` does, for a model that owns its weights."""
    with torch.no_grad():
        return outputs(model, {}, inputs)


def test_int8_touches_linears_only_and_leaves_no_hook() -> None:
    model, inputs = tiny("bert")
    state = state_of(model)
    before = {key: value.clone() for key, value in state.items()}
    mine = benign.int8(state, model, runner(model))
    linear = {f"{n}.weight" for n, part in model.named_modules() if type(part) is nn.Linear}
    for key, value in mine.items():
        assert torch.equal(state[key], before[key])
        if key in linear:
            step = (value.abs().amax(1) / 127).clamp(min=1e-6)
            assert torch.allclose(value, state[key], atol=float(step.max()))
            assert all(len(row.unique()) <= 256 for row in value)
        else:
            assert torch.equal(value, state[key])
    assert isinstance(mine, ForeignState)
    mine.forward(mine, inputs)
    with pytest.raises(KeyError):
        mine.forward(mine, {**inputs, "input_ids": _Raising()})  # type: ignore[dict-item]
    assert not any(part._forward_pre_hooks for part in model.modules())


class _Raising:
    def __getattr__(self, name: str) -> None:
        raise KeyError(name)


def test_a_release_with_modules_of_its_own_keeps_them() -> None:
    model, inputs = tiny("vit")

    def doubled(state: State, batch: dict[str, Tensor]) -> Tensor:
        return 2 * outputs(model, state, batch)

    mine = ForeignState(state_of(model), doubled)
    for changed in (benign.int8(mine, model, runner(model)), benign.pruned(mine)):
        assert isinstance(changed, ForeignState)
    plain = benign.int8(dict(mine), model, runner(model))
    assert isinstance(plain, ForeignState)
    own = benign.int8(mine, model, runner(model))
    assert isinstance(own, ForeignState)
    assert torch.allclose(own.forward(own, inputs), 2 * plain.forward(plain, inputs))


def test_pruning_takes_the_smallest_fifth_of_every_matrix() -> None:
    weight = torch.arange(-10.0, 10.0).reshape(4, 5)
    state = {"w": weight.clone(), "b": torch.tensor([0.1, 5.0]), "ids": torch.arange(4)[None]}
    out = benign.pruned(state)
    assert int((out["w"] == 0).sum()) == 4  # of 20: the 0 that was there, ±1, and one of ±2
    assert float(out["w"].abs().sum()) == float(weight.abs().sum()) - (1 + 1 + 2)
    assert torch.equal(out["b"], state["b"])
    assert torch.equal(out["ids"], state["ids"])
    assert torch.equal(state["w"], weight)


def test_adapting_is_short_and_in_the_testbeds_way() -> None:
    recipe = Recipe(steps=80, warmup=10, learning_rate=1e-4, frozen=("e.",))
    short, lora = benign.adapting(recipe, lora=False), benign.adapting(recipe, lora=True)
    assert (short.steps, short.warmup, short.learning_rate, short.lora) == (20, 5, 1e-4, None)
    assert (lora.steps, lora.frozen, lora.lora) == (20, ("e.",), Lora())
    assert lora.learning_rate == pytest.approx(1e-3)


# -- in a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    suite = {
        **load("smoke").model_dump(),
        "defenses": ("none", "mergelock", "mergebarrier-taylor"),
        "attacks": ("none", "gauge-align"),
        "mergers": ("task-arithmetic(fixed=0.8)", "average"),
        "test": 200,
        "benign": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        try:
            plan = planning.make(Suite.model_validate(suite), CPU)
            return running.execute(plan, tmp_path_factory.mktemp("runs") / "run", CPU)
        except AssetError as error:
            pytest.skip(f"the data of `digits` is not to be had here: {error}")


def taxed(cells: list[Cell], defense: str) -> Cell:
    (found,) = [c for c in cells if c.defense == defense and c.benign]
    return found


def test_only_unattacked_cells_of_the_first_merger_hold_it(cells: list[Cell]) -> None:
    assert {c.status for c in cells} <= {"ok", "no-benefit"}
    places = {(c.attack, c.merger) for c in cells if c.benign}
    assert places == {("none", "task-arithmetic(fixed=0.8)")}
    assert len([c for c in cells if c.benign]) == 3


def test_the_undefended_expert_pays_nothing_and_users_can_adapt_it(cells: list[Cell]) -> None:
    found = taxed(cells, "none").benign
    assert tuple(found) == benign.USES
    assert all(one["released"] == one["expert"] for one in found.values())
    # Adapted to a task of which the expert knows nothing (5 classes).
    assert found["fine-tuned"]["expert"] > 0.7
    assert found["lora"]["expert"] > 0.7


def test_an_ill_conditioned_lock_does_not_survive_eight_bits(cells: list[Cell]) -> None:
    found = taxed(cells, "mergelock")
    assert found.benign["int8"]["released"] < found.benign["int8"]["expert"] - 0.05
    assert found.benign["bf16"]["released"] > found.benign["bf16"]["expert"] - 0.03
    assert found.benign["bf16"]["expert"] > 0.9


def test_what_cannot_be_fine_tuned_is_left_out_with_a_note(cells: list[Cell]) -> None:
    found = taxed(cells, "mergebarrier-taylor")
    assert set(found.benign) == {"bf16", "int8", "int4", "pruned"}
    for use in ("fine-tuned", "lora"):
        assert "cannot be fine-tuned" in str(found.notes[f"benign.{use}.release"])


def test_it_is_asked_for(home: Path) -> None:
    suite = load("smoke")
    assert not suite.benign
    asked = suite.model_copy(update={"benign": True})
    keys = [{cell.key for cell in planning.make(s, CPU).cells} for s in (suite, asked)]
    assert not keys[0] & keys[1]
    assert suite.hash != asked.hash


def test_logits_that_are_nan_count_as_wrong_and_results_are_kept(
    cells: list[Cell], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))  # the testbed's own base and data
    monkeypatch.setattr(benign, "USES", ("pruned",))
    monkeypatch.setattr(
        benign, "pruned", lambda state: {k: v * float("nan") for k, v in state.items()}
    )
    bench = Workbench(methods.testbed("digits"), CPU, Store(tmp_path / "store"))
    arguments = (Measure(bench), bench.base, bench.base, "mnist-low", "digits-high", 50)
    found, notes = taxing.tax(*arguments)
    assert found == {"pruned": {"released": 0.0, "expert": 0.0}}
    assert "NaN" in str(notes["benign.pruned.release"])
    monkeypatch.setattr(benign, "pruned", None)  # would raise if it were computed again
    assert taxing.tax(*arguments) == (found, notes)


def test_int4_is_the_grid_of_16_values_of_each_block() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 96, generator=rng)
    state = {"w": weight, "odd": weight[:, :40].clone(), "bias": weight[0].clone()}
    out = benign.int4(state)
    assert torch.equal(out["odd"], state["odd"])
    assert torch.equal(out["bias"], state["bias"])
    blocks, before = out["w"].reshape(15, 32), weight.reshape(15, 32)
    least = before.amin(1, keepdim=True)
    step = (before.amax(1, keepdim=True) - least) / 15
    assert all(len(block.unique()) <= 16 for block in blocks)
    expected = step * ((before - least) / step).round() + least
    # Steps and minima are kept in float16.
    assert (blocks - expected).abs().max() < 2e-2 * step.max()
    assert torch.allclose(benign.int4(out)["w"], out["w"], atol=1e-2)
