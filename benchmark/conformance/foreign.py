"""The checks of a defense that changes modules: what users run is its tensors under its forward.

They look at every tiny architecture it accepts. A forward is code, which anybody can read and run;
all that it knows of the expert stands in the tensors that are shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.conformance.subjects import DefenseCase, expert
from benchmark.conformance.testbed import Architecture, Tiny
from benchmark.core.data import Split
from benchmark.core.state import ForeignState, State
from benchmark.evaluation.accuracy import relative_gap

#: Gap of features that another mode, another batch or another order of sums explains.
ROUNDING = 1e-4
#: Gap of features below which other modules compute what the base's do.
SAME = 1e-2
#: How much farther from the expert's features it may be where its owner had the inputs.
FARTHER, FARTHER_BY = 2.0, 0.05
#: Tensors of fewer numbers may be equal by chance.
_TELLING = 16

_MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad mode": torch.enable_grad,
}
_UNCHANGED = "changes no modules"

#: Part of the list of defenses.
check: Checks[DefenseCase] = Checks("defense")


@check.binding
def foreign_modules_differ(case: DefenseCase) -> str:
    """The base's modules compute something else from what it ships: or it must release that."""
    said = []
    for architecture, model in _foreign(case):
        testbed = Tiny(architecture)
        base, inputs = testbed.base(), testbed.task("first").test.inputs
        with torch.inference_mode():
            own = testbed.features({k: _named(model, k, v) for k, v in base.items()}, inputs)
            gap = relative_gap(own, model.forward(model, inputs))
        if gap <= SAME:
            raise CheckFailed(
                f"on {architecture} the base's own modules compute the same from its tensors "
                f"({gap:.1e} of the largest feature): it changes no modules, release those tensors"
            )
        _hidden(model, expert(testbed, "first"), base)
        said.append(f"{architecture} {gap:.1e}")
    return ", ".join(said) or _UNCHANGED


@check.binding
def forward_modes(case: DefenseCase) -> str | None:
    """A foreign forward answers alike in inference_mode, no_grad and grad mode."""
    for architecture, model in _foreign(case):
        task = Tiny(architecture).task("first")
        for split in (task.train, task.test):
            answers: dict[str, Tensor] = {}
            for name in (*_MODES, *_MODES):  # twice, lest it counts
                with _MODES[name]():
                    # Tensors of its own, since those of inference_mode stay what they are.
                    found = model.forward(model, split.inputs).detach().clone()
                _alike(answers.setdefault("inference_mode", found), found, f"in {name}")
    return _remark(case)


@check.binding
def forward_batches(case: DefenseCase) -> str | None:
    """A foreign forward answers an input alike whatever batch it comes in."""
    for architecture, model in _foreign(case):
        task = Tiny(architecture).task("first")
        for split in (task.train, task.test):
            with torch.inference_mode():
                whole = model.forward(model, split.inputs)
            for size in (1, 5, len(split) - 1):
                _alike(_batched(model, split, size), whole, f"in batches of {size}")
            turned = torch.arange(len(split)).flip(0)
            again = _batched(model, split[turned], len(split))[turned]
            _alike(again, whole, "in another order")
            both = torch.cat([turned, turned])
            doubled = _batched(model, split[both], len(both))[len(split) :][turned]
            _alike(doubled, whole, "in a batch of twice the size")
    return _remark(case)


@check.binding
def forward_inputs(case: DefenseCase) -> str:
    """A foreign forward is no farther from the expert on its owner's inputs than on others."""
    said = []
    for architecture, model in _foreign(case):
        testbed = Tiny(architecture)
        task, reference = testbed.task("first"), expert(testbed, "first")
        unseen = _distance(testbed, model, reference, task.test)
        for name, split in (("training", task.train), ("validation", task.validation)):
            found = _distance(testbed, model, reference, split)
            if found > FARTHER * unseen + FARTHER_BY:
                raise CheckFailed(
                    f"on {architecture} it is {found:.2f} from the expert's features on {name} "
                    f"inputs, {unseen:.2f} on others drawn alike"
                )
        said.append(f"{architecture} {unseen:.2f} from the expert")
    return ", ".join(said) or _UNCHANGED


@check.binding
def forward_holds_no_weights(case: DefenseCase) -> str | None:
    """A foreign forward is code: on the tensors of another release it runs that release."""
    first = case.shipped_for("first") if case.method.changes_modules else {}
    if not isinstance(first, ForeignState):
        return _UNCHANGED
    inputs = case.testbed.task("first").test.inputs
    before = _answer(first, first, inputs)
    second = case.shipped_for("second")
    _alike(_answer(first, first, inputs), before, "after another release was made")
    _alike(_answer(first, second, inputs), _answer(second, second, inputs), "by another's forward")
    _alike(_answer(second, first, inputs), before, "by another's forward")
    return None


def _foreign(case: DefenseCase) -> Iterator[tuple[Architecture, ForeignState]]:
    """Per architecture, what users run, where it is foreign; the check `shipped` tells the rest."""
    if case.method.changes_modules:
        for architecture in case.accepted():
            model = case.shipped(architecture)
            if isinstance(model, ForeignState):
                yield architecture, model


def _remark(case: DefenseCase) -> str | None:
    return None if case.method.changes_modules else _UNCHANGED


def _named(model: State, key: str, base: Tensor) -> Tensor:
    """What a reader of the shipped tensors would load as the base's ``key``."""
    found = model.get(key, base)
    return found if (found.shape, found.dtype) == (base.shape, base.dtype) else base


def _hidden(model: State, reference: State, base: State) -> None:
    """Fail if it holds a tensor of the expert under another name, in whatever order of numbers."""
    others = {_sorted(value): key for key, value in model.items() if key not in base}
    for key, value in reference.items():
        moved = value.numel() >= _TELLING and not torch.equal(value, base[key])
        name = others.get(_sorted(value)) if moved else None
        if name and _sorted(_named(model, key, base[key])) != _sorted(value):
            raise CheckFailed(f"holds the expert's {key!r} as {name!r}: ship it under its own name")


def _sorted(value: Tensor) -> bytes:
    return value.detach().float().flatten().sort().values.numpy().tobytes()


def _batched(model: ForeignState, split: Split, size: int) -> Tensor:
    with torch.inference_mode():
        parts = [
            model.forward(model, split[start : start + size].inputs)
            for start in range(0, len(split), size)
        ]
        return torch.cat(parts)


def _distance(testbed: Tiny, model: ForeignState, reference: State, split: Split) -> float:
    """The mean distance of its features, unit vectors, from those of the expert."""
    with torch.inference_mode():
        own, theirs = model.forward(model, split.inputs), testbed.features(reference, split.inputs)
        return float((own - theirs).norm(dim=1).mean())


def _answer(code: State, tensors: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the forward of one release makes of the tensors of another."""
    assert isinstance(code, ForeignState)
    with torch.inference_mode():
        return code.forward(tensors, inputs)


def _alike(found: Tensor, expected: Tensor, how: str) -> None:
    gap = relative_gap(found, expected)
    if not gap <= ROUNDING:
        raise CheckFailed(f"forward gives other features {how} (by {gap:.1e} of the largest)")
