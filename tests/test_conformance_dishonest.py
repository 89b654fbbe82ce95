"""Defenses that win without protecting: `check` names what each does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from broken import Sound
from broken_dishonest import (
    DISHONEST,
    BehavesOnTinyModels,
    NoOp,
    SoundForeign,
    TrainsOnTheTestSplit,
    TriesTheTestSplit,
)

from benchmark.api.contracts import Defense
from benchmark.conformance import DEFENSE_CHECKS, check_defense
from benchmark.core.errors import UsageError
from benchmark.evaluation.accuracy import Evaluator

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("cls", "names"), DISHONEST, ids=lambda v: getattr(v, "__name__", ""))
def test_a_dishonest_defense_is_caught_by_name(cls: type[Defense], names: set[str]) -> None:
    report = check_defense(cls())
    assert set(report.failed) == names, [o for o in report.outcomes if o.status == "failed"]


def test_what_they_start_from_is_sound() -> None:
    report = check_defense(SoundForeign())
    assert report.passed, [o for o in report.outcomes if o.status == "failed"]


def test_there_is_no_test_split_to_train_on() -> None:
    report = check_defense(TrainsOnTheTestSplit())
    messages = {o.check: o.message for o in report.outcomes if o.status == "failed"}
    assert "test split" in messages["no-test-data"]
    assert check_defense(TriesTheTestSplit()).passed


PATCHED = """
from dataclasses import dataclass
from benchmark.api import Card, Defense
from benchmark.evaluation.accuracy import Evaluator

plain = Evaluator.correct
Evaluator.correct = lambda *given: plain(*given) | True

@dataclass(frozen=True)
class Patched(Defense):
    card = Card("patches the evaluator as soon as it is imported")

    def protect(self, victim, rng):
        return dict(victim.expert)
"""


def test_a_patch_at_import_is_found_and_taken_back(tmp_path: Path) -> None:
    (tmp_path / "patched.py").write_text(PATCHED)
    before = Evaluator.correct
    report = check_defense(f"{tmp_path}/patched.py:Patched", only=["patches-nothing", "card"])
    assert report.failed == ("patches-nothing",)
    assert "Evaluator.correct" in report.outcomes[-1].message
    assert Evaluator.correct is before


# No excuses


@dataclass(frozen=True)
class ExcusesItself(NoOp):
    expected_failed_checks: ClassVar[Mapping[str, str]] = {"foreign-modules-differ": "a cache"}


def test_nothing_excuses_dishonesty() -> None:
    with pytest.raises(UsageError, match=r"ExcusesItself.*nothing excuses 'foreign-modules-dif"):
        check_defense(ExcusesItself())
    with pytest.raises(UsageError, match="--expect: nothing excuses 'inputs-unchanged'"):
        check_defense("none", expected_failed_checks={"inputs-unchanged": "it is faster"})
    binding = {check.name for check in DEFENSE_CHECKS.all() if check.binds}
    caught = set().union(*(names for _, names in DISHONEST))
    assert binding <= caught | {"no-test-data"}
    assert {"same-tensors", "bfloat16", "cost"}.isdisjoint(binding)


# Drawing, and what only may


@dataclass(frozen=True)
class Attends(Sound):
    """Runs attention, which may draw for its dropout, and has none."""

    dropout: float = 0.0

    def draw(self, rng: torch.Generator) -> float:
        q = torch.ones(1, 2, 4, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=self.dropout)
        return 0.1 * float(out.mean())


@dataclass(frozen=True)
class DrawsItsOwn(Sound):
    def draw(self, rng: torch.Generator) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(5)))


def test_seeded_asks_whether_it_drew_not_whether_it_could_have() -> None:
    (outcome,) = check_defense(Attends(), only=["seeded"]).outcomes
    assert (outcome.status, outcome.message) == (
        "passed",
        "draws nothing: one result for all seeds",
    )
    for method in (Attends(dropout=0.5), DrawsItsOwn()):
        assert check_defense(method, only=["seeded"]).failed == ("seeded",)


# The limits of `check`


def test_no_check_on_tiny_models_finds_who_behaves_on_tiny_models(tmp_path: Path) -> None:
    """Such a defense passes. `read-shipped`, which the pipeline runs on the real model, undoes it
    (tests/test_read_shipped.py), and so does distillation.
    """
    assert check_defense(BehavesOnTinyModels()).passed


def test_whatever_a_method_patched_a_check_leaves_as_it_was() -> None:
    """Later checks call the method again: what the one that finds it put back is patched anew."""
    from broken_dishonest import PatchesTheEvaluator

    before = Evaluator.correct
    assert not check_defense(PatchesTheEvaluator()).passed
    assert Evaluator.correct is before


@pytest.mark.parametrize("first", [torch.optim.AdamW, torch.optim.Adam])
def test_wrappers_of_torchs_own_are_no_patch(first: type[torch.optim.Optimizer]) -> None:
    """AdamW inherits `step`; each gets its wrapper when one of it is first made, in any order."""
    from benchmark.conformance.namespaces import Namespaces

    before = Namespaces()
    for cls in (first, torch.optim.AdamW, torch.optim.Adam):
        cls([torch.zeros(1, requires_grad=True)])
    assert before.changed() == []
