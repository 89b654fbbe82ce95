"""The checks of what a method that a free-rider runs knows and spends: attacks and mergers."""

from __future__ import annotations

from typing import Any

from benchmark.api.contracts import Access, Ensemble
from benchmark.conformance.behaviour import equal
from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.conformance.measure import optimizer_steps
from benchmark.conformance.scenes import FreeRiderCase
from benchmark.core.errors import AccessError

#: Part of the lists of attacks and of mergers.
check: Checks[FreeRiderCase[Any, Any]] = Checks("method")


@check
def access_tier(case: FreeRiderCase[Any, Any]) -> str:
    """It runs with the access it declares, raises AccessError with less, and reads no more."""
    declared = getattr(case.method, "access", None)
    if not isinstance(declared, Access):
        raise CheckFailed("needs access: ClassVar[Access]")
    inputs = case.scene()
    result = case.run(inputs)
    for tier, what in inputs.knowledge.log.asked:
        if tier > declared:
            raise CheckFailed(
                f"declares access {declared.label!r}, but {what} needs {tier.label!r}"
            )
    if not isinstance(case.method, Ensemble):  # its candidates are run by the pipeline
        for tier in (tier for tier in Access if tier < declared):
            try:
                case.run(case.scene(access=tier))
            except AccessError:
                continue
            raise CheckFailed(f"declares access {declared.label!r}, but runs with {tier.label!r}")
    if declared > Access.WEIGHTS:
        equal(case.run(case.scene(hide=True)), result, "data that its access does not cover")
    return declared.label


@check
def budget(case: FreeRiderCase[Any, Any]) -> str:
    """Every example it is given, forward pass and optimizer step stands in knowledge.budget."""
    inputs = case.scene()
    with optimizer_steps() as steps:
        case.run(inputs)
    charged, log = inputs.knowledge.budget, inputs.knowledge.log
    if charged.examples < log.examples:
        raise CheckFailed(f"is given {log.examples} examples, and charged for {charged.examples}")
    if charged.steps < len(steps):
        raise CheckFailed(
            f"takes {len(steps)} optimizer steps, and is charged for {charged.steps}: "
            "add them to knowledge.budget.steps"
        )
    if steps and not charged.flops:
        raise CheckFailed("trains, and is charged no FLOPs: add them to knowledge.budget.flops")
    if case.method.access > Access.WEIGHTS and not (
        charged.examples or isinstance(case.method, Ensemble)
    ):
        raise CheckFailed(f"declares access {case.method.access.label!r}, and uses no example")
    return f"{charged.examples} examples, {charged.steps} steps"
