"""The benign-use tax: what a release is worth after what honest users do, beside its expert."""

from __future__ import annotations

from typing import Any

from benchmark.core.errors import MethodError
from benchmark.core.state import ForeignState, State
from benchmark.evaluation import benign as uses
from benchmark.pipeline import identity
from benchmark.pipeline.identity import generator
from benchmark.pipeline.measure import Measure
from benchmark.pipeline.nodes import Node
from benchmark.pipeline.workbench import Workbench


def tax(
    measure: Measure, shipped: Node, expert: Node, judged: str, other: str, test: int
) -> tuple[dict[str, dict[str, float]], dict[str, object]]:
    """(use → accuracy of ``released`` and ``expert``, use → why it is left out or counts as 0).

    On the first ``test`` test examples: of the task ``judged``, and for the uses that fine-tune of
    the ``other`` task, on whose whole training split they do. Both see the same draws, whatever the
    seed of the release.
    """
    found: dict[str, dict[str, float]] = {}
    notes: dict[str, object] = {}
    for use in uses.USES:
        task = other if use in ("fine-tuned", "lora") else judged
        mine = _after(measure, shipped, use, task, test)
        theirs = _after(measure, expert, use, task, test)
        for who, one in (("release", mine), ("expert", theirs)):
            if one["note"]:
                notes[f"benign.{use}.{who}"] = one["note"]
        if mine["accuracy"] is not None and theirs["accuracy"] is not None:
            found[use] = {"released": mine["accuracy"], "expert": theirs["accuracy"]}
    return found, notes


def _after(measure: Measure, model: Node, use: str, task: str, test: int) -> dict[str, Any]:
    """``accuracy`` (None where the use is impossible) and ``note``; one result per model and use.

    Logits that are NaN are wrong answers here: the user has nothing, and that is the tax.
    """
    bench = measure.bench
    rows = range(min(test, len(measure.split(task, "test"))))
    key = identity.benign(bench.key, model.identity, use, task, rows.stop)

    def make() -> dict[str, Any]:
        try:
            state = _used(measure.bench, model.state(), use, task, key)
        except MethodError as error:
            return {"accuracy": None, "note": str(error)}
        bench.store.forget_training(key)
        try:
            right = bench.evaluator.correct(state, task, "test", rows)
        except MethodError as error:
            return {"accuracy": 0.0, "note": str(error)}
        return {"accuracy": float(right.mean()), "note": ""}

    found: dict[str, Any] = bench.store.result(key, make)
    return found


def _used(bench: Workbench, state: State, use: str, task: str, key: str) -> State:
    if use == "bf16":
        return uses.rounded(state)
    if use == "int8":
        return uses.int8(state, bench.testbed.module(), bench.testbed.features)
    if use == "int4":
        return uses.int4(state)
    if use == "pruned":
        return uses.pruned(state)
    if isinstance(state, ForeignState):
        raise MethodError("left out: its changed modules cannot be fine-tuned here")
    train = bench.trainer(f"{use} on {task}", key)
    adapted: State = train(
        state,
        {task: bench.evaluator.task(task).train},
        generator("benign", use, task),
        recipe=uses.adapting(bench.testbed.recipe, lora=use == "lora"),
    )
    return adapted
