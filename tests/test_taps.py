"""Taps: what enters the Linears of a running module is seen, replaced, and then left alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from zoo import NAMES, outputs, state_of, tiny
from zoo.decoders import MIXTURES

from benchmark.anatomy import Anatomy, Linear, MLPBlock, Slot, taps
from benchmark.core.errors import MethodError


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


#: Those whose hidden units nothing stands behind, and that are modules of their own.
PLAIN = [name for name in NAMES if name not in ("eva02", *MIXTURES)]


def applied(linear: Linear, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    out = inputs @ linear.weight.read(state).T
    return out if linear.bias is None else out + linear.bias.read(state)


@pytest.mark.parametrize("name", PLAIN)
def test_inputs_are_those_of_the_layers(name: str) -> None:
    """What enters down is what the recorded input of up and gate makes, recomputed by hand."""
    model, inputs = tiny(name)
    state = state_of(model)
    blocks = Anatomy.of(model).mlp
    keys = [x.weight.key for b in blocks for x in (b.up, b.gate, b.down) if x]
    outputs(model, state, inputs)  # transformers hooks layers when some models first run
    before = hooks(model)
    with taps.record(model, keys) as seen:
        outputs(model, state, inputs)
    for block in blocks:
        activation = ACT2FN[block.activation]
        up = applied(block.up, state, seen[block.up.weight.key])
        if block.gate is None:
            expected = activation(up)
        else:
            expected = activation(applied(block.gate, state, seen[block.gate.weight.key])) * up
        torch.testing.assert_close(seen[block.down.weight.key], expected, rtol=1e-4, atol=1e-5)
    assert hooks(model) == before


def test_calls_add_up_to_rows() -> None:
    model, inputs = tiny("vit")
    key = Anatomy.of(model).attention[0].q.weight.key
    with taps.record(model, [key, key]) as seen:
        for _ in range(3):
            outputs(model, state_of(model), inputs)
    assert seen[key].shape == (3 * 4 * 5, 64)  # calls × images × (patches + class token)
    assert not seen[key].requires_grad


def test_fused_attention_is_watched_and_its_output_projection_refused() -> None:
    model, inputs = tiny("open-clip")
    block = Anatomy.of(model).attention[0]
    assert taps.watchable(model, block.q.weight.key)
    with taps.record(model, [block.q.weight.key]) as seen:
        outputs(model, state_of(model), inputs)
    assert seen[block.q.weight.key].shape[1] == 64
    assert not taps.watchable(model, block.o.weight.key)
    with pytest.raises(MethodError, match=r"MultiheadAttention.*leave the Linear out"):
        taps.owner(model, block.o.weight.key)
    with (
        pytest.raises(MethodError),
        taps.watch(model, [block.q.weight.key, block.o.weight.key], lambda key, rows: None),
    ):
        pytest.fail("entered")
    assert hooks(model) == 0


def test_names_that_are_not_there() -> None:
    model, _ = tiny("vit")
    for key in ("nowhere.weight", "layers.0.mlp.fc9.weight"):
        with pytest.raises(MethodError, match="no tensor"):
            taps.owner(model, key)
    key = Anatomy.of(model).mlp[0].up.weight.key
    with taps.record(model, [key]) as seen:
        pass
    with pytest.raises(MethodError, match="did not run"):
        seen[key]


@pytest.mark.parametrize("name", PLAIN)
def test_replacing_what_enters_down(name: str) -> None:
    model, inputs = tiny(name)
    state = state_of(model)
    blocks = Anatomy.of(model).mlp
    plain = outputs(model, state, inputs)

    def same(block: MLPBlock) -> taps.Hidden:
        activation = ACT2FN[block.activation]
        return lambda up, gate: activation(up) if gate is None else activation(gate) * up

    with taps.replace(model, {block: same(block) for block in blocks}):
        torch.testing.assert_close(outputs(model, state, inputs), plain, rtol=1e-4, atol=1e-4)
    with taps.replace(model, {block: lambda up, gate: None for block in blocks}):
        assert torch.equal(outputs(model, state, inputs), plain)
    with taps.replace(model, {blocks[0]: lambda up, gate: torch.zeros_like(up)}):
        silenced = outputs(model, state, inputs)
    key = blocks[0].down.weight.key
    torch.testing.assert_close(
        silenced, outputs(model, {**state, key: torch.zeros_like(state[key])}, inputs)
    )
    assert float((silenced - plain).abs().max()) > 1e-3
    assert torch.equal(outputs(model, state, inputs), plain)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_not_watched(name: str) -> None:
    model, _ = tiny(name)
    expert = next(b for b in Anatomy.of(model).mlp if b.up.weight.index is not None)
    for key in (expert.up.weight.key, expert.down.weight.key):
        with pytest.raises(MethodError, match="holds many experts' weights"):
            taps.owner(model, key)


def test_what_a_norm_makes_of_hidden_units_is_not_replaced() -> None:
    model, _ = tiny("eva02")
    block = Anatomy.of(model).mlp[0]
    with (
        pytest.raises(MethodError, match="a norm stands before it"),
        taps.replace(model, {block: lambda up, gate: None}),
    ):
        pass


class FusedGate(nn.Module):
    """gate and up in one tensor, as Phi-3 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(3, 8)
        self.down = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def test_fused_gate_and_up_are_told_apart() -> None:
    model = FusedGate()
    block = MLPBlock(
        up=Linear(Slot("both.weight", rows=(4, 8))),
        gate=Linear(Slot("both.weight", rows=(0, 4))),
        down=Linear(Slot("down.weight")),
        activation="silu",
    )
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    def tripled(up: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return 3 * nn.functional.silu(gate) * up

    expected = 3 * (model(x) - model.down.bias) + model.down.bias
    with taps.replace(model, {block: tripled}):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("tap", ["watch", "record", "replace"])
def test_hooks_go_whatever_happens(tap: str) -> None:
    model, inputs = tiny("bert")
    block = Anatomy.of(model).mlp[0]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    made = {
        "watch": lambda: taps.watch(model, [block.up.weight.key], fail),
        "record": lambda: taps.record(model, [block.up.weight.key]),
        "replace": lambda: taps.replace(model, {block: fail}),
    }[tap]

    def fails_inside() -> None:
        with made():
            assert hooks(model) > 0
            outputs(model, state_of(model), inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert hooks(model) == 0
