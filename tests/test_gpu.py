"""What a GPU asks for: nothing waits for the device batch by batch. Tests marked gpu need one.

The device ``meta`` stands in where there is none: whatever reads a value on the host raises there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import some_slow
from torch import Tensor

from benchmark.api import methods
from benchmark.api.contracts import Testbed
from benchmark.api.recipe import Recipe
from benchmark.core.data import Split, Task
from benchmark.core.errors import AssetError
from benchmark.evaluation.accuracy import Evaluator
from benchmark.learn.training import fine_tune
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Suite, load

META = torch.device("meta")
TESTBEDS = some_slow(["digits", "minilm", "dinov2-small"], {"minilm", "dinov2-small"})
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return home


def on_testbed(spec: str) -> tuple[Testbed, Task]:
    testbed = methods.testbed(spec).method
    try:
        testbed.base()
        task = testbed.task(testbed.tasks[0])
    except AssetError as error:
        pytest.skip(f"the data of {spec} is not to be had here: {error}")
    few = slice(0, 70)
    return testbed, replace(task, train=task.train[few], test=task.test[few])


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}


@pytest.mark.parametrize("spec", TESTBEDS)
def test_a_forward_pass_reads_nothing_on_the_host(spec: str) -> None:
    testbed, task = on_testbed(spec)
    state, inputs = moved(testbed.base(), META), moved(task.test.inputs, META)
    with torch.inference_mode():
        assert testbed.features(state, inputs).shape == (len(task.test), task.head.shape[1])


@pytest.mark.parametrize("spec", TESTBEDS)
def test_training_reads_nothing_on_the_host(spec: str) -> None:
    testbed, task = on_testbed(spec)
    state = moved(testbed.base(), META)
    recipe = replace(testbed.recipe, steps=4, batch_size=32)  # two epochs of 70 rows
    examples = {task.name: task.train.to(META)}
    rng = torch.Generator().manual_seed(0)
    trained = fine_tune(testbed, {task.name: task}, state, examples, rng, recipe=recipe)
    assert {key: value.device for key, value in trained.items()} == dict.fromkeys(state, META)
    assert any(trained[key] is not state[key] for key in state)


def test_the_order_of_an_epoch_goes_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmark.learn.training import Batches

    batches = Batches(
        Split({"x": torch.arange(40.0)}, torch.arange(40)), 8, torch.Generator().manual_seed(0)
    )
    sent: list[int] = []
    whole = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: (sent.append(len(self)), whole(self, *a, **k))[1]
    )
    rows = [batches.draw().labels for _ in range(10)]
    assert sent == [40, 40]
    assert sorted(torch.cat(rows[:5]).tolist()) == list(range(40))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("spec", TESTBEDS)
def test_training_never_waits_for_the_gpu(spec: str) -> None:
    testbed, task = on_testbed(spec)
    cuda = torch.device("cuda")
    recipe = Recipe(steps=6, batch_size=8, frozen=testbed.recipe.frozen)

    def strict(step: int, steps: int) -> None:  # the first step sends the epoch's order
        torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    rng = torch.Generator().manual_seed(0)
    start, examples = moved(testbed.base(), cuda), {task.name: task.train.to(cuda)}
    try:
        fine_tune(testbed, {task.name: task}, start, examples, rng, recipe=recipe, progress=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("spec", TESTBEDS)
def test_evaluation_waits_once_and_agrees_with_the_cpu(spec: str) -> None:
    testbed, task = on_testbed(spec)
    reference = Evaluator(testbed, torch.device("cpu"))
    there = Evaluator(testbed, torch.device("cuda"), batch_size=16)
    rows = range(64)
    wanted = reference.logits(reference.base, task.name, "test", rows)
    there.logits(there.base, task.name, "test", rows)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = there.logits(there.base, task.name, "test", rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in heard) <= 1
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3


@pytest.mark.gpu
@needs_gpu
def test_a_suite_runs_on_the_gpu(tmp_path: Path) -> None:
    asked = {**load("smoke").model_dump(), "defenses": ("none", "mergelock"), "test": 200}
    cuda = torch.device("cuda")
    cells = running.execute(planning.make(Suite.model_validate(asked), cuda), tmp_path, cuda)
    assert {cell.status for cell in cells} == {"ok"}
    aligned = [c for c in cells if (c.defense, c.attack) == ("mergelock", "gauge-align")]
    assert all(cell.protection is not None and abs(cell.protection) < 0.1 for cell in aligned)
