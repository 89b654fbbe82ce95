"""Measures the models of a workbench; every outcome is stored under what it is an outcome of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmark.api.contracts import Testbed
from benchmark.core.data import Split
from benchmark.core.pictures import pack
from benchmark.core.state import State, norm_growth, rounded
from benchmark.evaluation.statistics import pack_bits, unpack_bits
from benchmark.pipeline import identity
from benchmark.pipeline.nodes import Node
from benchmark.pipeline.workbench import Workbench

#: Examples on which the gap of half precision is measured.
_HALF = 64


class Measure:
    """What models of one workbench answer."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.store = bench.store
        self.evaluator = bench.evaluator

    def split(self, task: str, split: str) -> Split:
        """One split of a task."""
        return self.evaluator.task(task).split(split)

    def bits(
        self, model: str, build: Callable[[], State], task: str, split: str, rows: range
    ) -> np.ndarray:
        """Which of the ``rows`` the model of this identity gets right: (len(rows),) bool."""
        key = identity.outcomes(self.bench.key, model, task, split, rows)
        packed = self.store.get(key)
        if packed is None:
            packed = pack_bits(self.evaluator.correct(build(), task, split, rows, model))
            self.store.put(key, packed)
        return unpack_bits(packed, len(rows))

    def of(self, node: Node, task: str, split: str, rows: range) -> np.ndarray:
        """The same of a node's State."""
        return self.bits(node.identity, node.state, task, split, rows)

    def gap(self, node: Node, reference: Node, task: str, rows: range) -> float:
        """Max relative |Δlogit| of two nodes on test examples. Outcomes come on the way."""

        key = identity.gap(self.bench.key, node.identity, reference.identity, task, rows.stop)
        found: float | None = self.store.get(key)
        if found is None:
            found, right = self.evaluator.gap(
                node.state(),
                reference.state(),
                task,
                "test",
                rows,
                (node.identity, reference.identity),
            )
            outcomes = identity.outcomes(self.bench.key, node.identity, task, "test", rows)
            self.store.put(outcomes, pack_bits(right))
            self.store.put(key, found)
        return found

    def quality(
        self, model: str, build: Callable[[], State], task: str, n: int
    ) -> dict[str, float]:
        """What the testbed measures of a model's work on the first ``n`` test examples."""
        if type(self.bench.testbed).quality is Testbed.quality:
            return {}

        def made() -> dict[str, float]:
            whole = self.evaluator.task(task)
            return self.bench.testbed.quality(build(), replace(whole, test=whole.test[:n]))

        key = identity.quality(self.bench.key, model, task, n)
        found: dict[str, float] = self.store.result(key, made)
        return found

    def pictures(self, model: str, build: Callable[[], State], task: str) -> str:
        """A few of what a model draws, packed; empty where there is nothing to see."""
        if type(self.bench.testbed).pictures is Testbed.pictures:
            return ""

        def made() -> str:
            found = self.bench.testbed.pictures(build(), self.evaluator.task(task))
            return "" if found is None else pack(found.cpu().numpy())

        key = identity.pictures(self.bench.key, model, task)
        return str(self.store.result(key, made))

    def in_bf16(self, node: Node, task: str) -> float:
        """Max relative |Δlogit| that storing a node's State in bfloat16 costs."""
        rows = range(min(_HALF, len(self.split(task, "test"))))
        key = identity.bf16(self.bench.key, node.identity, task, rows.stop)

        def gap() -> float:
            state = node.state()
            names = ("", node.identity)
            return self.evaluator.gap(rounded(state), state, task, "test", rows, names)[0]

        return float(self.store.result(key, gap))

    def growth(self, node: Node, reference: Node) -> float:
        """The largest growth of a weight matrix's norm over the reference's."""
        key = identity.growth(node.sha256, reference.sha256)
        return float(self.store.result(key, lambda: norm_growth(node.state(), reference.state())))
