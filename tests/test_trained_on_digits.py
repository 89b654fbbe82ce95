"""Training-time defenses on real data, through the workbench: utility, notes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.api.methods import defense, testbed
from benchmark.core.errors import AssetError
from benchmark.core.state import State, task_vector
from benchmark.learn import snapshots
from benchmark.pipeline.measure import Measure
from benchmark.pipeline.store import Store
from benchmark.pipeline.workbench import Workbench
from defenses.trap2 import scaled

pytestmark = pytest.mark.slow

VICTIM = "mnist-low"
QUICK = "trap2(grid=(0.02, 0.05), tolerance=1.0, steps=0.1)"


def bench(folder: Path) -> Workbench:
    try:
        made = Workbench(testbed("digits(steps=60)"), torch.device("cpu"), Store(folder))
        made.evaluator.task(VICTIM)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    return made


@pytest.fixture
def digits(home: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return bench(home / "trained")


@pytest.mark.parametrize(
    "spec",
    [
        "trap2(weight=0.1)",
        "trap2(weight=0.1, adapter=lora)",
        "mergeguard",
        "arf(distance=0.2)+mergelock",
    ],
)
def test_released_models_work(digits: Workbench, spec: str) -> None:
    expert, released = digits.expert(VICTIM), digits.released(defense(spec), VICTIM, 0)
    measure, rows = Measure(digits), range(500)
    utility = measure.of(released, VICTIM, "test", rows).mean()
    reference = measure.of(expert, VICTIM, "test", rows).mean()
    assert measure.gap(released, expert, VICTIM, rows) > 1e-3
    assert utility > reference - 0.05
    base, state = digits.base.state(), released.state()
    moved = task_vector(state, base)
    assert moved
    assert not any(key.startswith(digits.testbed.recipe.frozen) for key in moved)
    if "lora" in spec:
        linears = [b.linears()[t].weight.key for b in digits.anatomy.attention for t in "qkvo"]
        assert moved.keys() == set(linears)
        assert max(int(torch.linalg.matrix_rank(t, rtol=1e-4)) for t in moved.values()) <= 16
    if "arf" in spec:
        reached: Any = released.facts["notes"]["arf.distance"]
        assert min(reached) > 0.18


def test_trapped_model_loses_more_when_its_task_vector_is_scaled(digits: Workbench) -> None:
    rows = range(500)

    def at(model: State, s: float) -> float:
        state = scaled(digits.base.state(), model, s)
        return float(digits.evaluator.correct(state, VICTIM, "test", rows).mean())

    expert = digits.expert(VICTIM).state()
    trap = digits.released(defense("trap2(weight=0.405, steps=3)"), VICTIM, 0).state()
    assert at(trap, 1.0) > at(expert, 1.0) - 0.05
    for s in (0.3, 0.5, 1.5):
        assert at(trap, s) < at(expert, s) - 0.2


def test_notes_survive_the_store(digits: Workbench) -> None:
    first = digits.released(defense(QUICK), VICTIM, 0).facts["notes"]
    assert first["trap2.weight"] == 0.05
    assert [one["weight"] for one in first["trap2.search"]] == [0.02, 0.05]
    again = bench(digits.store.root)
    assert again.released(defense(QUICK), VICTIM, 0).facts["notes"] == first
    assert again.released(defense("none"), VICTIM, 0).facts["notes"] == {}


def test_an_interrupted_search_repeats_no_finished_training(
    digits: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digits.released(defense(QUICK), VICTIM, 1)
    monkeypatch.setattr(snapshots, "SAVE_EVERY", 0.0)
    own = bench(tmp_path)
    own.expert(VICTIM).state()
    files = tmp_path / "training"
    assert not list(files.iterdir())  # the expert is stored, its file gone
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if sum("step 4/6" in line for line in heard) == 2:
            raise KeyboardInterrupt

    own.notify = stop
    with pytest.raises(KeyboardInterrupt):
        own.released(defense(QUICK), VICTIM, 1).state()
    assert len(list(files.iterdir())) == 2
    heard.clear()
    own = bench(tmp_path)
    own.notify = heard.append
    released = own.released(defense(QUICK), VICTIM, 1)
    released.state()
    assert [line.split(": ")[1] for line in heard if "training" in line] == ["step 5/6", "step 6/6"]
    assert released.sha256 == whole.sha256
    assert released.facts["notes"] == whole.facts["notes"]
    assert not list(files.iterdir())
