"""States: compatibility, τ arithmetic, digests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmark.core import state as checkpoint
from benchmark.core.errors import CheckpointError
from benchmark.core.state import State


def _state(seed: int = 0) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=rng, dtype=torch.float64),
        "bias": torch.randn(4, generator=rng, dtype=torch.float64),
        "ids": torch.arange(5),
    }


def _with(key: str, value: Tensor) -> State:
    return _state() | {key: value}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": _state()["weight"]}, "lacks tensor 'bias' \\(and 1 more\\)"),
        (_with("scale", torch.ones(1)), "unexpected tensor 'scale'"),
        (
            _with("bias", torch.ones(5, dtype=torch.float64)),
            "shape \\(5,\\), the base has \\(4,\\)",
        ),
        (_with("bias", torch.ones(4)), "float32, the base has torch.float64"),
        (_with("bias", torch.tensor([0.0, 1, float("nan"), 2]).double()), "'bias' holds NaN"),
        (_with("weight", torch.full((4, 3), float("inf")).double()), "'weight' holds NaN or inf"),
    ],
)
def test_incompatible_states_are_named(state: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"the victim.*{message}"):
        checkpoint.compatible(state, _state(), "the victim")


def test_compatible_states_pass() -> None:
    checkpoint.compatible(_state(1), _state(2), "the victim")


def test_large_finite_tensors_are_finite() -> None:
    """Their float32 sum would overflow."""
    checkpoint.finite({"weight": torch.full((1000,), 3e38)}, "x")


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(CheckpointError, match="infinity"):
        checkpoint.finite({"weight": torch.tensor([float("inf"), float("-inf")])}, "x")


@given(st.integers(0, 2**16), st.floats(-2, 2))
def test_adding_a_task_vector(seed: int, scale: float) -> None:
    base, expert = _state(seed), _state(seed + 1)
    moved = checkpoint.add(base, checkpoint.task_vector(expert, base), scale)
    for key in ("weight", "bias"):
        expected = (1 - scale) * base[key] + scale * expert[key]
        torch.testing.assert_close(moved[key], expected)


def test_task_vector_leaves_out_what_did_not_move() -> None:
    base = _state()
    expert = base | {"bias": base["bias"] + 1, "ids": base["ids"] + 1}
    tau = checkpoint.task_vector(expert, base)
    assert set(tau) == {"bias"}
    assert checkpoint.norm(tau) == pytest.approx(2.0)
    assert checkpoint.add(base, tau)["weight"] is base["weight"]


def test_digest_is_of_names_dtypes_shapes_and_bytes() -> None:
    state = _state()
    reordered = dict(reversed(state.items()))
    assert checkpoint.digest(state) == checkpoint.digest(reordered)
    others: list[State] = [
        _with("bias", state["bias"] + 1e-12),
        _with("bias", state["bias"][:, None]),
        _with("bias", state["bias"].view(torch.int64)),
        {("Bias" if key == "bias" else key): value for key, value in state.items()},
    ]
    digests = {checkpoint.digest(other) for other in others}
    assert len(digests) == len(others)
    assert checkpoint.digest(state) not in digests


def test_digest_of_a_transposed_view_is_that_of_its_copy() -> None:
    weight = _state()["weight"].T
    assert checkpoint.digest({"w": weight}) == checkpoint.digest({"w": weight.contiguous()})
