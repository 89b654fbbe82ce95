"""Selection without sorting, and merging a piece at a time: exactly what the whole gives."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mergers import assert_equal, generator, members, run

from benchmark.core.state import task_vector
from benchmark.merging import selection, streaming
from benchmark.merging.selection import threshold
from benchmark.merging.streaming import Cut, Difference, differences

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def difference(values: torch.Tensor) -> Difference:
    return Difference(values, torch.zeros_like(values))


def by_sorting(parts: list[Difference], count: int) -> float:
    sizes = [abs(float(x)) for part in parts for x in part[:]]
    return sorted(sizes, reverse=True)[count - 1] if count < len(sizes) else 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    steps=st.sampled_from([None, 1, 3]),
    gather=st.sampled_from([0, 5, 2**22]),
    data=st.data(),
)
def test_threshold_is_what_a_sort_gives(
    seed: int,
    dtype: torch.dtype,
    sizes: list[int],
    spread: float,
    steps: int | None,
    gather: int,
    data: st.DataObject,
) -> None:
    """Magnitudes over many binades, rounded to few values (ties, zeros), in pieces, with digits."""
    rng = generator(seed)
    parts = []
    for size in sizes:
        value = torch.randn(size, generator=rng)
        value = value * torch.exp(spread * torch.randn(size, generator=rng)).clamp(1e-4, 1e3)
        parts.append(difference((value if steps is None else (value * steps).round()).to(dtype)))
    count = data.draw(st.integers(1, sum(sizes)))
    with patch.object(selection, "GATHER", gather), patch.object(streaming, "PIECE", 7):
        found = threshold(parts, count)
    assert float(found) == by_sorting(parts, count)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_of_equal_of_subnormal_and_of_mixed_entries(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    with patch.object(selection, "GATHER", 2):
        assert float(threshold([difference(torch.full((9,), -0.5, dtype=dtype))], 4)) == 0.5
        small = torch.tensor([0.0, -tiny / 2, tiny / 4, 0.0, tiny, -0.0], dtype=dtype)
        found = [float(threshold([difference(small)], k)) for k in (1, 2, 3, 4)]
        assert found == [tiny, tiny / 2, tiny / 4, 0.0]
        mixed = [difference(torch.arange(5.0)), difference(torch.arange(5).to(dtype) + 0.5)]
        assert float(threshold(mixed, 3)) == 3.5


def test_threshold_of_a_million_entries_takes_a_histogram() -> None:
    value = torch.randn(2**20, generator=generator())
    order = np.sort(np.abs(value.numpy()))[::-1]
    with patch.object(selection, "GATHER", 2**14):
        for count in (1, 1000, 200_000, 2**20 - 1):
            assert float(threshold([difference(value)], count)) == order[count - 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_keeps_entries_that_tie_with_its_bounds(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 0.25, -0.5, 0.75, -1.0, 2.0], dtype=dtype)
    kept = Cut(difference(values), 0.5, 1.0)[:]
    assert kept.tolist() == [0.0, 0.0, -0.5, 0.75, 0.0, 0.0]
    assert Cut(difference(values), 0.0)[1:3].tolist() == [0.25, -0.5]
    assert not Cut(difference(values), float("inf"))[:].any()


def test_differences_are_the_task_vector() -> None:
    base, (expert,) = members(4, 1)
    expert["frozen"] = base["frozen"].clone()  # equal, though another tensor
    tau = task_vector(expert, base)
    lazy = differences(expert, base)
    assert lazy.keys() == tau.keys()
    for key, delta in lazy.items():
        assert torch.equal(delta[:], tau[key].reshape(-1))
        assert len(delta) == tau[key].numel()


@pytest.mark.parametrize(
    "spec",
    ["average", "task-arithmetic", "ties", "ties(scope=tensor, normalize=true)", "breadcrumbs"],
)
def test_pieces_and_layout_do_not_matter(spec: str) -> None:
    base, experts = members(5, 3)
    for state in (base, *experts):
        state["w"] = state["w"].T.contiguous().T  # stored column by column
    whole = run(spec, base, experts, (0.5, -0.25, 1.0))
    with patch.object(streaming, "PIECE", 16):
        assert_equal(run(spec, base, experts, (0.5, -0.25, 1.0)), whole)
    rows = [{k: v.contiguous() for k, v in state.items()} for state in (base, *experts)]
    assert_equal(run(spec, rows[0], rows[1:], (0.5, -0.25, 1.0)), whole)
