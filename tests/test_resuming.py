"""Training that was stopped continues to the same bits; LoRA adapters, resumed too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from plane import PLANE, RECIPE, TASKS, Plane, noisy, tuned
from torch import Tensor
from zoo import BATCH, state_of, tiny

from benchmark.anatomy import Anatomy
from benchmark.api.recipe import Lora, Recipe, plain
from benchmark.core.data import Split, Task
from benchmark.core.errors import MethodError
from benchmark.core.state import State, digest
from benchmark.learn import snapshots
from benchmark.learn.training import fine_tune

# Resuming

KILLED = """
import os, sys
from pathlib import Path
from benchmark.learn import snapshots
from plane import noisy, tuned
snapshots.SAVE_EVERY = 0.0
def stop(step, steps):
    if step == 17:
        os.kill(os.getpid(), 9)
tuned("signs", "order", loss=noisy, progress=stop, resume=Path(sys.argv[1]))
"""


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A resume file, written after every step."""
    monkeypatch.setattr(snapshots, "SAVE_EVERY", 0.0)
    return tmp_path / "training" / "one.pt"


def stopping(at: int, error: type[BaseException]) -> Callable[[int, int], None]:
    def progress(step: int, steps: int) -> None:
        if step == at:
            raise error

    return progress


def again(file: Path | None, seed: int = 0, **options) -> tuple[State, int, int]:
    """A run with everything that must survive: (State, next draw of the generator, steps made)."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    state = fine_tune(
        PLANE,
        TASKS,
        PLANE.base(),
        {name: task.train for name, task in TASKS.items()},
        rng,
        loss=noisy,
        resume=file,
        **{"progress": lambda step, steps: made.append(step), **options},
    )
    return state, int(torch.randint(10**9, (), generator=rng)), len(made)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("at", "error"), [(1, RuntimeError), (23, KeyboardInterrupt)])
def test_a_stopped_training_continues_to_the_same_bits(
    file: Path, at: int, error: type[BaseException], schedule: str
) -> None:
    recipe = replace(RECIPE, schedule=schedule)  # type: ignore[arg-type]
    whole, draw, _ = again(None, recipe=recipe)
    with pytest.raises(error):
        again(file, recipe=recipe, progress=stopping(at, error))
    resumed, after, steps = again(file, recipe=recipe)
    assert steps == RECIPE.steps - at
    assert digest(resumed) == digest(whole)
    assert after == draw


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(file: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(file)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    resumed, _, steps = again(file)
    # The kill came after step 17 was written and before anything else could be.
    assert steps == RECIPE.steps - 17
    assert digest(resumed) == digest(again(None)[0])


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path, ctrl_c: None) -> None:
    calls = []

    def loss(batch, state, rng):
        calls.append(len(calls))
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return noisy(batch, state, rng)

    file = tmp_path / "one.pt"
    loss.__qualname__ = noisy.__qualname__  # a file is told apart by the name of its loss
    with pytest.raises(KeyboardInterrupt):
        tuned(loss=loss, resume=file)
    assert len(calls) == 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    made = []
    resumed = tuned(loss=noisy, resume=file, progress=lambda step, steps: made.append(step))
    assert made[0] == 11
    assert digest(resumed) == digest(tuned(loss=noisy))


def test_a_second_ctrl_c_does_not_wait_and_saves_no_half_step(file: Path, ctrl_c: None) -> None:
    calls = []

    def loss(batch, state, rng):
        calls.append(len(calls))
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return noisy(batch, state, rng)

    loss.__qualname__ = noisy.__qualname__
    with pytest.raises(KeyboardInterrupt):
        tuned(loss=loss, resume=file)
    made = []
    resumed = tuned(loss=noisy, resume=file, progress=lambda step, steps: made.append(step))
    assert made[0] == 10
    assert digest(resumed) == digest(tuned(loss=noisy))


def test_a_finished_training_is_not_repeated(file: Path) -> None:
    state, draw, steps = again(file)
    assert steps == RECIPE.steps
    assert (digest(state), draw, 0) == (digest(again(file)[0]), *again(file)[1:])


def test_a_short_training_leaves_no_file(tmp_path: Path) -> None:
    again(tmp_path / "one.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["bit", "short", "empty", "text"])
def test_a_damaged_file_is_ignored(file: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(file, progress=stopping(9, KeyboardInterrupt))
    content = bytearray(file.read_bytes())
    first = min(
        entry.header_offset
        for entry in zipfile.ZipFile(file).infolist()
        if "/data/" in entry.filename
    )
    content[first + 200] ^= 1  # inside the first tensor: the pickle around it stays readable
    file.write_bytes(
        {"bit": bytes(content), "short": content[: len(content) // 2], "empty": b""}.get(
            harm, json.dumps({"done": 9}).encode()
        )
    )
    state, _, steps = again(file)
    assert steps == RECIPE.steps
    assert digest(state) == digest(again(None)[0])
    assert "damaged" in caplog.text


@pytest.mark.parametrize("change", ["seed", "recipe", "examples", "loss", "start"])
def test_the_file_of_another_training_is_ignored(file: Path, change: str) -> None:
    def run(resume: Path | None, progress=None, changed: bool = False) -> State:
        now = change if changed else ""
        start = PLANE.base()
        start["weight"] = start["weight"] * (2 if now == "start" else 1)
        return fine_tune(
            PLANE,
            TASKS,
            start,
            {"signs": TASKS["signs"].train[: 90 if now == "examples" else 100]},
            torch.Generator().manual_seed(int(now == "seed")),
            recipe=replace(RECIPE, learning_rate=0.1 if now == "recipe" else 0.05),
            loss=plain if now == "loss" else noisy,
            progress=progress,
            resume=resume,
        )

    with pytest.raises(KeyboardInterrupt):
        run(file, stopping(9, KeyboardInterrupt))
    assert digest(run(file, changed=True)) == digest(run(None, changed=True))


# LoRA


FEW = Recipe(steps=6, batch_size=BATCH, learning_rate=0.01)


@dataclass(frozen=True)
class Small(Plane):
    """A tiny random model of the zoo; two classes in its last outputs."""

    model: str = "bert"
    recipe: Recipe = FEW

    def content_hash(self) -> str:
        return self.model

    def base(self) -> State:
        return state_of(tiny(self.model)[0])

    def anatomy(self) -> Anatomy:
        return Anatomy.of(tiny(self.model)[0])

    def task(self, name: str) -> Task:
        labels = torch.arange(BATCH) % 2
        split = Split(dict(tiny(self.model)[1]), labels)
        return Task(name, ("no", "yes"), split, split, split, torch.eye(8)[:2], 10.0)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        result = torch.func.functional_call(
            tiny(self.model)[0], state, kwargs=dict(inputs), tie_weights=False
        )
        values = result.values() if isinstance(result, Mapping) else result
        # Of every tower, and of the last token: a causal model's first one attends to itself alone,
        # so that its query has no gradient.
        last = [v.flatten(1)[:, -8:] for v in values if isinstance(v, Tensor) and v.ndim > 1]
        return torch.nn.functional.normalize(torch.stack(last).sum(0), dim=-1)

    def tuned(self, lora: Lora, seed: int = 0, **options) -> State:
        task = self.task("one")
        return fine_tune(
            self,
            {"one": task},
            self.base(),
            {"one": task.train},
            torch.Generator().manual_seed(seed),
            recipe=replace(self.recipe, lora=lora, **options),
        )


@pytest.mark.parametrize("name", ["bert", "gpt2", "open-clip-custom-text"])
def test_lora_moves_only_the_projections_and_by_its_rank(name: str) -> None:
    small = Small(model=name)
    base, state = small.base(), small.tuned(Lora(rank=2, alpha=4.0, targets=("q", "o")))
    blocks = small.anatomy().attention
    moved = {key for key in base if not torch.equal(base[key], state[key])}
    assert moved == {b.linears()[t].weight.key for b in blocks for t in ("q", "o")}
    for block in blocks:
        for target, linear in block.linears().items():
            weight = linear.weight.read(base).double()
            tau = linear.weight.read(state).double() - weight
            if target in ("k", "v"):
                assert not tau.any()  # never written, though q may share their tensor
                continue
            spectrum = torch.linalg.svdvals(tau)
            assert float(spectrum[0]) > 1e-3 * float(torch.linalg.matrix_norm(weight, 2))
            assert float(spectrum[1]) > 1e-3 * float(spectrum[0])
            # Beyond the rank there is only the rounding of W + delta.
            assert float(spectrum[2]) < 1e-4 * float(spectrum[0])


def test_lora_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    small = Small()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = digest(small.tuned(Lora(rank=2), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert digest(small.tuned(Lora(rank=2), seed=1)) == one
    assert digest(small.tuned(Lora(rank=2), seed=2)) != one


def test_lora_scales_by_alpha_over_rank_and_respects_frozen_tensors() -> None:
    small = Small()
    block = small.anatomy().attention[0]
    key = block.q.weight.key
    state = small.tuned(Lora(rank=2), frozen=(key,))
    assert state[key] is not None
    assert torch.equal(state[key], small.base()[key])
    assert not torch.equal(state[block.k.weight.key], small.base()[block.k.weight.key])
    # One step of Adam moves B by the learning rate whatever alpha is: tau is proportional to it.
    single = {"steps": 1, "warmup": 0, "clip": None, "eps": 1e-12}
    taus = [
        small.tuned(Lora(rank=2, alpha=alpha), **single)[key].double() - small.base()[key].double()
        for alpha in (4.0, 400.0)
    ]
    torch.testing.assert_close(
        100 * taus[0], taus[1], rtol=0, atol=1e-2 * float(taus[1].abs().max())
    )


def test_lora_resumes(file: Path) -> None:
    small = Small()
    task = small.task("one")

    def run(progress=None, resume: Path | None = None) -> State:
        return fine_tune(
            small,
            {"one": task},
            small.base(),
            {"one": task.train},
            torch.Generator().manual_seed(0),
            recipe=replace(small.recipe, lora=Lora(rank=2)),
            progress=progress,
            resume=resume,
        )

    with pytest.raises(KeyboardInterrupt):
        run(stopping(3, KeyboardInterrupt), file)
    assert digest(run(resume=file)) == digest(run())


def test_lora_needs_attention() -> None:
    with pytest.raises(MethodError, match="no attention weight"):
        tuned(recipe=replace(RECIPE, lora=Lora()))


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}])
def test_lora_ranges(bad: dict) -> None:
    with pytest.raises(ValueError, match="LoRA needs"):
        Lora(**bad)
