"""The testbed `diffusion-digits`: how it draws and learns, what is measured of what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.anatomy import Anatomy
from benchmark.api import methods
from benchmark.api.recipe import Batch, Recipe
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError
from benchmark.core.pictures import MOST, pack, unpack
from benchmark.core.state import State, digest, rounded
from benchmark.evaluation.accuracy import Evaluator
from benchmark.learn.training import fine_tune
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.suite import Group, Suite
from benchmark.reporting import columns, write
from benchmark.reporting.ranking import rank
from benchmark.testbeds import diffusion_digits, samples
from benchmark.testbeds.diffusion_digits import DiffusionDigits

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quick")


@pytest.fixture
def quick(shared: Path, monkeypatch: pytest.MonkeyPatch) -> DiffusionDigits:
    """Barely trained, in a cache of its own that these tests share."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(shared))
    pretraining = Recipe(steps=3, batch_size=16, learning_rate=1e-3)
    monkeypatch.setattr(diffusion_digits, "_PRETRAINING", pretraining)
    monkeypatch.setattr(diffusion_digits, "_CLASSIFYING", 1)
    monkeypatch.setattr(diffusion_digits, "_SIZES", {"validation": 40, "test": 60})
    diffusion_digits._classifier.cache_clear()
    yield DiffusionDigits(steps=3, euler=4)  # type: ignore[misc]
    diffusion_digits._classifier.cache_clear()


def still(testbed: DiffusionDigits) -> State:
    """A model whose velocity is 0 everywhere."""
    state = dict(testbed.base())
    for name in ("layernorm.weight", "layernorm.bias"):
        state[name] = torch.zeros_like(state[name])
    return state


def test_an_image_is_where_noise_flows(quick: DiffusionDigits) -> None:
    task = quick.task("low")
    asked = task.test[:5].inputs
    assert torch.equal(quick.images(still(quick), asked), asked["noise"])
    # A constant velocity moves every pixel by itself, whatever the number of steps.
    moved = still(quick)
    moved["layernorm.bias"] = torch.arange(64.0) / 64
    patch = (diffusion_digits._projection().T @ moved["layernorm.bias"]).reshape(2, 2)
    drawn = quick.images(moved, asked) - asked["noise"]
    torch.testing.assert_close(drawn, patch.repeat(4, 4).expand(5, 1, 8, 8), atol=1e-5, rtol=0)
    state = quick.base()
    more = replace(quick, euler=8)
    assert not torch.allclose(quick.images(state, asked), more.images(state, asked))


def test_the_loss_is_the_squared_error_of_the_velocity(quick: DiffusionDigits) -> None:
    task = quick.task("low")
    examples = task.train[:6]
    batch = Batch.of(task, examples, quick.features, quick.loss, generator(3))
    noise = torch.randn(6, 1, 8, 8, generator=batch.rng())
    wanted = (examples.answers["image"] - noise).square().mean()
    torch.testing.assert_close(batch.loss(still(quick)), wanted)
    state = {k: v.clone().requires_grad_() for k, v in quick.base().items()}
    found = torch.autograd.grad(batch.loss(state), list(state.values()), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in found)


def test_who_has_no_images_learns_nothing(quick: DiffusionDigits) -> None:
    """Noise and classes are what anybody may ask with; images come with labels only."""
    task = quick.task("low")
    assert set(task.train.inputs) == set(task.test.inputs) == {"noise", "code"}
    with pytest.raises(MethodError, match="learns from images"):
        fine_tune(quick, {"low": task}, quick.base(), {"low": task.test}, generator())
    with pytest.raises(UsageError, match=r"no task 'lowe'.*low"):
        quick.task("lowe")
    with pytest.raises(ValueError, match="euler"):
        DiffusionDigits(euler=0)


def test_what_is_right_is_what_the_classifier_sees(quick: DiffusionDigits) -> None:
    task = quick.task("inverted")
    images, labels = diffusion_digits.real("test")
    classifier = diffusion_digits._classifier()
    found = task.logits(classifier.features(images)).argmax(1)
    assert (found == labels).float().mean() > 0.8  # after one epoch
    assert set(task.test.labels.tolist()) == set(range(10, 15))
    # What is drawn of noise that is an image already, by a model that moves nothing.
    still_is = Evaluator(quick, CPU)
    asked = {**task.test[:5].inputs, "noise": images[:5]}
    logits = task.logits(quick.features(still(quick), asked))
    assert torch.equal(logits.argmax(1), found[:5])
    assert still_is.task("low").scale == task.scale


def test_images_of_training_and_of_judging_are_disjoint() -> None:
    seen, judged = (
        {tuple(row.tolist()) for row in diffusion_digits.real(part)[0].flatten(1)}
        for part in ("train", "test")
    )
    assert len(judged) > 1000
    assert not seen & judged


@pytest.mark.parametrize("lock", ["params", "mergelock", "full-gauge"])
def test_an_exact_lock_leaves_every_pixel(lock: str, quick: DiffusionDigits) -> None:
    asked = quick.task("high").test[:20].inputs
    base = quick.base()
    task = quick.task("high")
    expert = fine_tune(quick, {"high": task}, base, {"high": task.train}, generator())
    owner = planned_owner(quick, base, expert)
    locked = methods.defense(lock).method.protect(owner, generator(1))
    assert digest(locked) != digest(expert)
    mine, theirs = quick.images(locked, asked), quick.images(expert, asked)
    assert (mine - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())
    assert (quick.images(rounded(locked), asked) - mine).abs().max() > 1e-5


def planned_owner(testbed: DiffusionDigits, base: State, expert: State):
    from benchmark.api.contracts import Victim

    task = testbed.task("high").without_test()

    def train(start, examples, rng, *, recipe=None, loss=None):
        tasks = dict.fromkeys(examples, task)
        return fine_tune(testbed, tasks, start, examples, rng, recipe=recipe, loss=loss)

    return Victim(
        base, expert, Anatomy.of(testbed.module()), task, testbed.recipe, train,
        testbed.initialise, testbed.features, testbed.module(), loss=testbed.loss,
    )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    ["trap2", "trap2(adapter=lora)", "mergeguard(tune=false, fraction=0.1)", "arf"],
)
def test_defenses_that_train_work_on_a_denoising_loss(spec: str, quick: DiffusionDigits) -> None:
    task = quick.task("high")
    base = quick.base()
    expert = fine_tune(quick, {"high": task}, base, {"high": task.train}, generator())
    made = methods.defense(spec).method.protect(planned_owner(quick, base, expert), generator(1))
    assert made.keys() == base.keys()
    assert digest(made) not in (digest(base), digest(expert))
    assert all(bool(value.isfinite().all()) for value in made.values())


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    rng = generator()
    real = torch.randn(4000, 3, generator=rng)
    assert samples.frechet(real, real) == pytest.approx(0, abs=1e-9)
    assert samples.frechet(real + torch.tensor([3.0, 0, 4]), real) == pytest.approx(25, rel=1e-6)
    # Independent axes: Σ (σ − σ')².
    assert samples.frechet(real * torch.tensor([2.0, 1, 1]), real) == pytest.approx(1, rel=0.1)


def test_precision_is_of_what_is_made_and_recall_of_what_is_real() -> None:
    rng = generator()
    real = torch.randn(200, 2, generator=rng)
    same = samples.measures(real, real)
    assert (same["precision"], same["recall"]) == (1, 1)
    narrow = samples.measures(real[:1].repeat(200, 1), real)
    assert narrow["precision"] == 1
    assert narrow["recall"] < 0.05
    far = samples.measures(real + 100, real)
    assert (far["precision"], far["recall"]) == (0, 0)


def test_cells_and_the_board_state_the_quality(
    quick: DiffusionDigits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "testbed", lambda spec: methods.Named("quick", quick))
    suite = Suite(
        name="q", description="q", testbed="quick",
        groups=(Group(victim="low", partners=("high",)),), defenses=("none", "params"),
        attacks=("none",), mergers=("task-arithmetic",), test=60, validation_rungs=(10, 40),
    )  # fmt: skip
    cells = running.execute(planning.make(suite, CPU), tmp_path / "run", CPU)
    for cell in cells:
        assert cell.status in ("ok", "no-benefit"), cell.reason
        assert set(cell.quality) == {"released", "undefended", "attacked"}
        assert set(cell.quality["attacked"]) == {"frechet", "precision", "recall"}
        # Five digits, two of each, from the same noise.
        assert {unpack(text).shape for text in cell.pictures.values()} == {(10, 8, 8)}
    none, params = cells
    assert none.pictures["undefended"] == none.pictures["attacked"] == params.pictures["undefended"]
    write(tmp_path / "run", cells, {})
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What is drawn" in page
    assert page.count('alt="drawn by the model') == 6
    board = rank(cells)
    assert {row.track for row in board.rows} == {"generators"}
    assert "Ranking of generators" in page
    shown = columns.of_view("page", board)
    assert "quality" in {column.name for column in shown}
    row = board.rows[0]
    column = next(column for column in shown if column.name == "quality")
    assert column.show(row).text == f"{row.quality['attacked']['frechet']:.2f}"


STRANGER = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from benchmark.api import Card, Defense

@dataclass(frozen=True)
class Trains(Defense):
    card: ClassVar[Card] = Card(summary="trains", trains=True)

    def protect(self, victim, rng):
        few, draws = victim.task.train[:8], torch.Generator().manual_seed(0)
        loss = victim.batch(few, draws).loss(victim.base)
        victim.note("trains.loss", float(loss))
        return victim.train(victim.base, rng)
"""


@pytest.mark.slow
def test_a_stranger_trains_on_the_same_loss_in_a_process_of_its_own(
    quick: DiffusionDigits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "testbed", lambda spec: methods.Named("quick", quick))
    (tmp_path / "strange.py").write_text(STRANGER)
    suite = Suite(
        name="q", description="q", testbed="quick",
        groups=(Group(victim="low", partners=("high",)),), attacks=("none",),
        defenses=("none", f"{tmp_path / 'strange.py'}:Trains"),
        mergers=("task-arithmetic",), test=60, validation_rungs=(10, 40),
    )  # fmt: skip
    _, cell = running.execute(planning.make(suite, CPU), tmp_path / "run", CPU)
    assert cell.status in ("ok", "no-benefit"), cell.reason
    task, base = quick.task("low"), quick.base()
    batch = Batch.of(task, task.train[:8], quick.features, quick.loss, generator(0))
    assert cell.notes["trains.loss"] == pytest.approx(float(batch.loss(base)), rel=1e-5)
    assert cell.sha256.released not in (cell.sha256.base, cell.sha256.expert)


def test_pictures_are_text_that_says_its_own_size() -> None:
    some = np.linspace(-0.5, 1.5, 2 * 3 * 4).reshape(2, 3, 4)
    assert np.array_equal(unpack(pack(some)), np.round(some.clip(0, 1) * 255))
    assert unpack(pack(np.full((1, 1, 1), np.nan))).tolist() == [[[0]]]
    with pytest.raises(ValueError, match="pixels"):
        pack(np.zeros((1, 200, 200)))
    whole = pack(some)
    for damaged in ("", "2x3:00", whole[:-1], whole + "00", whole.replace("2x", "0x", 1),
                    whole.upper(), f"9999x9999x9999:{'00' * 4}", f"1x1x{MOST + 1}:00"):  # fmt: skip
        with pytest.raises(UnmergeBenchError, match="damaged pictures"):
            unpack(damaged)
