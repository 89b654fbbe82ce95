"""TIES against mergekit's on the same checkpoints, task arithmetic against the speed of memory.

They take minutes and a quiet machine: they run only when asked for.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import subjects
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmark.core.state import State

pytestmark = [pytest.mark.timeout(900), pytest.mark.benchmark(group="merging 2 × 87.8 M")]

COMMAND = "pytest tests/benchmarks -n 0 --benchmark-enable"

Models = tuple[State, list[State]]
#: mergekit's formula, and the default.
SAME = "ties(scope=tensor, normalize=true)"
OURS = ["ties", "ties(scope=tensor)", SAME]


@pytest.fixture(autouse=True, scope="module")
def two_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """The figures are for two cores; other tests run on one thread."""
    if not request.config.getoption("benchmark_enable"):
        pytest.skip(COMMAND)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> Models:
    return subjects.vit_b()


def size(state: State) -> int:
    return sum(value.nbytes for value in state.values())


def seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


@pytest.mark.parametrize("spec", [*OURS, "breadcrumbs"])
def test_ours(spec: str, models: Models, benchmark: BenchmarkFixture) -> None:
    merged = benchmark.pedantic(subjects.merge, (spec, *models), rounds=5, warmup_rounds=1)
    assert merged.keys() == models[0].keys()


def test_ties_is_eight_times_as_fast_as_mergekits(
    models: Models, benchmark: BenchmarkFixture
) -> None:
    pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")
    ours: dict[str, list[float]] = {spec: [] for spec in OURS}

    def in_turns() -> tuple[tuple[object, ...], dict[str, object]]:
        """Before every round of theirs, one of each of ours: both see the same machine."""
        for spec, taken in ours.items():
            taken.append(seconds(subjects.merge, spec, *models))
        return ("mergekit", *models), {}

    theirs = benchmark.pedantic(subjects.merge, setup=in_turns, rounds=3)
    slow = benchmark.stats.stats.median
    ratios = {spec: slow / statistics.median(taken) for spec, taken in ours.items()}
    benchmark.extra_info.update(ratios=ratios, ours=ours, theirs=benchmark.stats.stats.data)
    print(f"\nmergekit {benchmark.stats.stats.data} s, ours {ours} s: {ratios} times as fast")
    assert min(ratios.values()) >= 8
    merged = subjects.merge(SAME, *models)
    for key, value in theirs.items():
        # Of entries that tie with the threshold mergekit keeps some, we keep all.
        gap = (merged[key] - value).norm() / (value - models[0][key]).norm()
        assert float(gap) < 0.01, key


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_ties_needs_less_memory_than_mergekits() -> None:
    pytest.importorskip("mergekit", reason="pip install 'unmergebench[mergekit]'")
    peaks = {}
    for spec in (*OURS, "mergekit"):
        command = [sys.executable, subjects.__file__, spec]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[spec] = round(int(done.stdout) / subjects.MIB)
    print(f"\nMiB above the inputs at the peak: {peaks}")
    assert max(peaks[spec] for spec in OURS) < peaks["mergekit"]


def test_task_arithmetic_runs_at_the_speed_of_memory(
    models: Models, benchmark: BenchmarkFixture
) -> None:
    base, experts = models
    plain: list[float] = []

    def add() -> State:
        """torch alone, nothing but the traffic: two tensors read, one written."""
        return {key: torch.add(experts[0][key], experts[1][key]) for key in base}

    def in_turns() -> tuple[tuple[object, ...], dict[str, object]]:
        plain.append(seconds(add))
        return ("task-arithmetic", base, experts), {}

    benchmark.pedantic(subjects.merge, setup=in_turns, rounds=7)
    traffic = size(base)
    # Base and two experts are read, the merged model is written.
    ours = 4 * traffic / benchmark.stats.stats.median / 1e9
    torchs = 3 * traffic / statistics.median(plain) / 1e9
    benchmark.extra_info.update(gigabytes_per_second=ours, plain_add=torchs)
    print(f"\ntask arithmetic {ours:.1f} GB/s, a plain sum of two models {torchs:.1f} GB/s")
    # It reads the base twice and makes two task vectors: five passes through a cache.
    assert ours >= 0.3 * torchs
