"""A defense of somebody else's that does, each time, what the file ``told`` beside it says.

The tests copy this file to a folder of their own. Much of what it does is meant ill.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.api import Card, Defense, ForeignState, State, Victim
from benchmark.evaluation.accuracy import Evaluator

# As if every model were right.
Evaluator.logits = lambda *arguments: torch.zeros(0)  # type: ignore[method-assign]

WEIGHT = "weight"


def told() -> str:
    return Path(__file__).with_name("told").read_text()


def moved(victim: Victim, rng: torch.Generator) -> State:
    noise = torch.randn(victim.expert[WEIGHT].shape, generator=rng)
    return {**victim.expert, WEIGHT: victim.expert[WEIGHT] + noise}


def in_place(victim: Victim, rng: torch.Generator) -> State:
    for state in (victim.base, victim.expert):
        for value in state.values():
            if value.is_floating_point():
                value += 1.0
    victim.task.train.inputs["x"].zero_()
    victim.task.head.zero_()
    return dict(victim.expert)


def trained_on_test(victim: Victim, rng: torch.Generator) -> State:
    return victim.fine_tune(victim.expert, {victim.task.name: victim.task.test}, rng)


def another_task(victim: Victim, rng: torch.Generator) -> State:
    return victim.fine_tune(victim.expert, {"order": victim.task.train}, rng)


def trained(victim: Victim, rng: torch.Generator) -> State:
    return victim.train(victim.expert, rng)


def drawn(victim: Victim, rng: torch.Generator) -> State:
    first, second = victim.initialise(rng), victim.initialise(rng)
    assert not torch.equal(first[WEIGHT], second[WEIGHT])
    return {**victim.expert, WEIGHT: second[WEIGHT]}


def noted(victim: Victim, rng: torch.Generator) -> State:
    victim.note("stranger.found", {"least": [1, 2.5]})
    return dict(victim.expert)


def noted_a_tensor(victim: Victim, rng: torch.Generator) -> State:
    victim.note("stranger.found", torch.ones(1))
    return dict(victim.expert)


def looked_around(victim: Victim, rng: torch.Generator) -> State:
    """What the environment says, and what the built-in testbed gives."""
    from benchmark.core.paths import cache
    from benchmark.testbeds.digits import Digits

    victim.note("variables", dict(os.environ))
    victim.note("cache", str(cache()))
    victim.note("modules", sorted(sys.modules))
    for task in ("mnist-low", "digits-low"):
        try:
            victim.note(task, len(Digits().task(task).test))
        except Exception as error:
            victim.note(task, type(error).__name__)
    return dict(victim.expert)


def printed(victim: Victim, rng: torch.Generator) -> State:
    for _ in range(40):
        print('{"say": "done"}\n' * 5000)
    os.write(1, b'{"say": "done", "foreign": true}\n')
    return moved(victim, rng)


def forged(victim: Victim, rng: torch.Generator) -> State:
    """Something that is no message, through every pipe that is open."""
    for number in range(3, 64):
        try:
            os.write(number, b"no message\n")
        except OSError:
            continue
    return dict(victim.expert)


def gone(victim: Victim, rng: torch.Generator) -> State:
    os._exit(0)


def left(victim: Victim, rng: torch.Generator) -> State:
    raise SystemExit(3)


def mistaken(victim: Victim, rng: torch.Generator) -> State:
    return {"x": {}["x"]}


def listed(victim: Victim, rng: torch.Generator) -> Any:
    return list(victim.expert)


def numbers(victim: Victim, rng: torch.Generator) -> Any:
    return {**victim.expert, WEIGHT: 3}


class Lazy(dict):  # type: ignore[type-arg]
    """A dict that says another thing each time."""

    def items(self) -> Any:
        return [(key, value * 2) for key, value in super().items()]


def another_dict(victim: Victim, rng: torch.Generator) -> State:
    return Lazy(victim.expert)


def misshapen(victim: Victim, rng: torch.Generator) -> State:
    return {**victim.expert, WEIGHT: torch.ones(2, 2)}


def not_a_number(victim: Victim, rng: torch.Generator) -> State:
    return {**victim.expert, WEIGHT: victim.expert[WEIGHT] * torch.nan}


def in_a_graph(victim: Victim, rng: torch.Generator) -> State:
    return {**victim.expert, WEIGHT: victim.expert[WEIGHT].clone().requires_grad_() * 1}


# Forward passes


def plain(victim: Victim, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    return victim.features({key: state[key] for key in victim.expert}, inputs)


def honest_when_judged(victim: Victim, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model only in inference mode and in large batches, which is how it is judged."""
    judged = torch.is_inference_mode_enabled() and len(inputs["x"]) >= 64
    return plain(victim, state if judged else victim.base, inputs)


def telling(victim: Victim, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    modes = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
    victim.note("asked", [len(inputs["x"]), *modes])
    return plain(victim, state, inputs)


def flat(victim: Victim, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    return plain(victim, state, inputs).flatten()


RELEASES: dict[str, Callable[[Victim, torch.Generator], State]] = {
    function.__name__: function
    for function in (
        moved, in_place, trained_on_test, another_task, trained, drawn, noted, noted_a_tensor,
        looked_around, printed, forged, gone, left, mistaken, listed, numbers, another_dict,
        misshapen, not_a_number, in_a_graph,
    )
}  # fmt: skip
FORWARDS: dict[str, Callable[[Victim, State, Mapping[str, Tensor]], Tensor]] = {
    function.__name__: function for function in (plain, honest_when_judged, telling, flat)
}


@dataclass(frozen=True)
class Stranger(Defense):
    """Does as it is told, and claims to be a control."""

    size: int = 1
    card: ClassVar[Card] = Card("does as it is told", role="control")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return RELEASES[told()](victim, rng)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        tensors = moved(victim, rng)
        if told() == "fickle":
            tensors[WEIGHT] = tensors[WEIGHT] + torch.randn(())
            forward = plain
        else:
            forward = FORWARDS[told()]
        return ForeignState(
            {**tensors, "extra": released[WEIGHT]},
            lambda state, inputs: forward(victim, state, inputs),
        )

    @property
    def changes_modules(self) -> bool:
        return True


@dataclass(frozen=True)
class Nameless(Stranger):
    card: ClassVar[str] = "me"  # type: ignore[assignment]


@dataclass(frozen=True)
class Raising(Stranger):
    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"need size >= 0, got {self.size}")
        raise KeyError("x")


class Plain(Defense):
    """No dataclass."""


class Nobody:
    pass
