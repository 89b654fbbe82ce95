"""Nodes: what is made once, whose outcomes are whose, and that nothing handed over is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from plane import Plane
from torch import Tensor

from benchmark.api.contracts import Access, Attack, Card, Defense, Knowledge, Members, Victim
from benchmark.api.methods import Named, attack, defense, merger
from benchmark.core.errors import Tampered
from benchmark.core.state import ForeignState, State, digest, rounded
from benchmark.pipeline.candidates import Candidate
from benchmark.pipeline.cells import CellMaker
from benchmark.pipeline.measure import Measure
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import Workbench

CPU = torch.device("cpu")
GROUP = Group(victim="signs", partners=("order",))
SUITE = Suite(
    name="plane",
    description="a linear model",
    testbed="plane",
    groups=(GROUP,),
    defenses=("none",),
    attacks=("none",),
    mergers=("task-arithmetic",),
    test=50,
    validation_rungs=(8, 32),
)


def bench(folder: Path) -> Workbench:
    return Workbench(Named("plane", Plane()), CPU, Store(folder))


def at(
    of: Defense | None = None, by: Attack | None = None, through: str = "task-arithmetic"
) -> Situation:
    return Situation(
        GROUP,
        0,
        Named(type(of).__name__, of) if of else defense("none"),
        Named(type(by).__name__, by) if by else attack("none"),
        merger(through),
    )


@dataclass(frozen=True)
class Liar(Defense):
    """Ships the expert's tensors behind a forward that answers at random."""

    card: ClassVar[Card] = Card("lies")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return dict(victim.base)

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            return -victim.features(state, inputs)

        return ForeignState(victim.expert, forward)


def test_what_runs_its_own_code_never_answers_for_its_tensors(tmp_path: Path) -> None:
    """Whatever comes first, on a warm or a cold store: expert and impostor keep their outcomes."""
    rows = range(50)
    for order in (("expert", "liar"), ("liar", "expert")):
        made = bench(tmp_path / "-".join(order))
        measure = Measure(made)
        nodes = {
            "expert": made.expert("signs"),
            "liar": made.shipped(Named("liar", Liar()), "signs", 0),
        }
        right = {who: measure.of(nodes[who], "signs", "test", rows).mean() for who in order}
        gap = measure.gap(nodes["liar"], nodes["expert"], "signs", rows)
        assert nodes["expert"].sha256 == nodes["liar"].sha256
        assert right["expert"] > 0.9
        assert right["liar"] < 0.1
        assert gap > 1


def test_the_first_cell_does_not_pay_for_the_partners_training(tmp_path: Path) -> None:
    made = bench(tmp_path)
    recovered = made.recovered(at(by=attack("norm-match").method))
    trained = made.expert("order").facts["seconds"]
    assert recovered.facts["seconds"] < trained / 2


def test_what_a_defense_reports_is_kept_with_what_it_took(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Notes(Defense):
        card: ClassVar[Card] = Card("reports", trains=True)

        def protect(self, victim: Victim, rng: torch.Generator) -> State:
            victim.note("notes.found", 3)
            return victim.train(victim.base, rng)

    first = bench(tmp_path).released(Named("notes", Notes()), "signs", 0).facts
    again = bench(tmp_path).released(Named("notes", Notes()), "signs", 0).facts
    assert first == again
    assert first["notes"] == {"notes.found": 3}
    assert first["seconds"] > 0


def test_a_state_under_another_name_is_not_believed(tmp_path: Path) -> None:
    """The file of one expert copied over that of another is made again."""
    made = bench(tmp_path)
    right = {task: made.expert(task).sha256 for task in ("signs", "order")}
    assert right["signs"] != right["order"]
    files = {task: tmp_path / f"states/{made.expert(task).key}.safetensors" for task in right}
    files["signs"].write_bytes(files["order"].read_bytes())
    from benchmark.core.state import digest

    assert digest(bench(tmp_path).expert("signs").state()) == right["signs"]


def _in_place(state: State) -> None:
    state["weight"].mul_(1.5)


def _through_data(state: State) -> None:
    state["weight"].data *= 1.5  # torch does not count this


def _through_numpy(state: State) -> None:
    state["weight"].numpy()[:] *= 1.5


@pytest.mark.parametrize("harm", [_in_place, _through_data, _through_numpy])
@pytest.mark.parametrize("what", ["the base", "the expert for signs", "the expert for order"])
def test_nothing_handed_over_may_change(tmp_path: Path, harm, what: str) -> None:
    @dataclass(frozen=True)
    class Noise(Defense):
        card: ClassVar[Card] = Card("spoils what it is given")

        def protect(self, victim: Victim, rng: torch.Generator) -> State:
            harm(victim.base if what == "the base" else victim.expert)
            return dict(victim.expert)

    @dataclass(frozen=True)
    class Spoils(Attack):
        card: ClassVar[Card] = Card("spoils a partner")
        access: ClassVar[Access] = Access.WEIGHTS

        def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
            return self.members(released, knowledge, rng).released

        def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
            harm(knowledge.partners[0])
            return Members(knowledge.base, released, knowledge.partners)

    maker = CellMaker(bench(tmp_path), SUITE)
    clean = maker.compute("clean", at())
    spoiling = at(by=Spoils()) if what == "the expert for order" else at(of=Noise())
    cell = maker.compute("key", spoiling)
    assert cell.status == "error"
    assert f"changed {what} in place (tensor 'weight')" in cell.reason
    assert cell.protection is None
    assert not cell.correct
    # And no later cell is any the worse for it.
    after = maker.compute("clean", at())
    assert after.correct == clean.correct
    assert after.sha256 == clean.sha256


def test_a_merger_that_writes_to_a_member_is_found_out(tmp_path: Path) -> None:
    from benchmark.merging.linear import TaskArithmetic

    @dataclass(frozen=True)
    class Greedy(TaskArithmetic):
        def prepare(self, base, experts, knowledge, rng):
            inner = super().prepare(base, experts, knowledge, rng)

            def merged(setting):
                experts[-1]["weight"].mul_(0.5)
                return inner(setting)

            return merged

    maker = CellMaker(bench(tmp_path), SUITE)
    situation = Situation(GROUP, 0, defense("none"), attack("none"), Named("greedy", Greedy()))
    maker.rider.bench.guard.watch("the expert for order", maker.bench.expert("order").state())
    cell = maker.compute("key", situation)
    assert cell.status == "error"
    assert "merger greedy changed the expert for order in place" in cell.reason


@dataclass(frozen=True)
class Raising(Attack):
    """Fails in a way of its own."""

    error: type[Exception] = KeyError
    card: ClassVar[Card] = Card("raises")
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        raise self.error("no luck\nat all")


@pytest.mark.parametrize("error", [KeyError, ValueError, RuntimeError, ZeroDivisionError])
def test_an_attack_that_fails_is_an_error_and_never_protection(
    tmp_path: Path, error: type[Exception]
) -> None:
    cell = CellMaker(bench(tmp_path), SUITE).compute("key", at(by=Raising(error)))
    assert cell.status == "error"
    assert cell.reason.startswith(error.__name__)
    assert "\n" not in cell.reason
    assert cell.protection is None


@pytest.mark.parametrize("bad", ["nan", "raises", "short"])
def test_a_setting_that_gives_no_model_is_skipped(tmp_path: Path, bad: str) -> None:
    """One NaN among the free-rider's settings costs him that setting, not the whole search."""
    from benchmark.merging.linear import TaskArithmetic

    @dataclass(frozen=True)
    class Partly(TaskArithmetic):
        def prepare(self, base, experts, knowledge, rng):
            inner = super().prepare(base, experts, knowledge, rng)

            def merged(setting):
                state = inner(setting)
                if setting.coefficients[0] >= 1:
                    return state
                if bad == "raises":
                    raise ValueError("cost matrix is infeasible")
                if bad == "short":
                    return {k: v for k, v in state.items() if k != "weight"}
                return {**state, "weight": state["weight"] * float("nan")}

            return merged

    maker = CellMaker(bench(tmp_path), SUITE)
    whole = maker.compute("whole", at())
    some = maker.compute(
        "some", Situation(GROUP, 0, defense("none"), attack("none"), Named("partly", Partly()))
    )
    assert some.status == whole.status != "error", some.reason
    assert 0 < some.search.failed < some.search.settings == whole.search.settings
    assert whole.search.failed == 0
    assert some.merged_setting["coefficients"][0] >= 1


def test_where_no_setting_gives_a_model_the_merge_is_an_error(tmp_path: Path) -> None:
    from benchmark.merging.linear import TaskArithmetic

    @dataclass(frozen=True)
    class Never(TaskArithmetic):
        def prepare(self, base, experts, knowledge, rng):
            def merged(setting):
                raise KeyError("weight")

            return merged

    situation = Situation(GROUP, 0, defense("none"), attack("none"), Named("never", Never()))
    cell = CellMaker(bench(tmp_path), SUITE).compute("key", situation)
    assert cell.status == "error"
    assert "candidates can be run (KeyError: 'weight')" in cell.reason


def test_a_call_from_the_cell_to_a_made_state_is_short(tmp_path: Path) -> None:
    """CellMaker → Node.facts → Node.members → its timing → the making → the method."""
    import traceback

    depths: list[list[str]] = []

    @dataclass(frozen=True)
    class Looks(Defense):
        card: ClassVar[Card] = Card("looks up")

        def protect(self, victim: Victim, rng: torch.Generator) -> State:
            names = [frame.name for frame in traceback.extract_stack()]
            depths.append(names[names.index("_fill") :])
            return dict(victim.expert)

    CellMaker(bench(tmp_path), SUITE).compute("key", at(of=Looks()))
    assert max(map(len, depths)) == 1 + 5, depths


def test_outcomes_of_equal_models_are_shared(tmp_path: Path) -> None:
    """`none` releases the expert: nothing about it is computed twice."""
    made = bench(tmp_path)
    measure = Measure(made)
    released = made.released(defense("none"), "signs", 0)
    first = Candidate.of("released", released)
    assert first.content == made.expert("signs").identity
    measure.of(made.expert("signs"), "signs", "test", range(50))

    def never() -> State:
        raise AssertionError("computed twice")

    measure.bits(first.content, never, "signs", "test", range(50))


def test_tampering_is_no_candidates_failure() -> None:
    from benchmark.core.errors import AssetError, Interrupted, stop_if_serious

    for serious in (Tampered("x"), AssetError("x"), Interrupted("x"), OSError(28, "disk full")):
        with pytest.raises(type(serious)):
            stop_if_serious(serious)
    for harmless in (KeyError("x"), OSError(2, "no such file"), MemoryError()):
        stop_if_serious(harmless)


@dataclass(frozen=True)
class InHalf(Plane):
    """A testbed whose releases are stored in bfloat16."""

    stored = "bfloat16"


@dataclass(frozen=True)
class Shifted(Defense):
    """Adds a number to every weight that its own forward takes away: float32 has room for both."""

    card: ClassVar[Card] = Card("a large number added and taken away again")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {**victim.expert, "weight": victim.expert["weight"] + 8192}

    def shipped(self, victim: Victim, released: State, rng: torch.Generator) -> State:
        def forward(state: State, inputs: Mapping[str, Tensor]) -> Tensor:
            return victim.features({**state, "weight": state["weight"] - 8192}, inputs)

        return ForeignState(released, forward)


def test_a_release_is_judged_as_it_is_stored(tmp_path: Path) -> None:
    """Rounded to bfloat16, whoever reads it; exactness is measured before, in float32."""
    halved = Workbench(Named("plane", InHalf()), CPU, Store(tmp_path))
    cell = CellMaker(halved, SUITE).compute("key", at())
    expert = halved.expert("signs")
    assert cell.sha256.expert == expert.sha256
    assert cell.sha256.released == digest(rounded(expert.state())) != expert.sha256
    assert cell.logit_gap == 0
    assert cell.bf16_gap == cell.bf16_gap_expert > 0
    assert cell.recovered_gap == 0
    kept = bench(tmp_path / "whole")
    assert CellMaker(kept, SUITE).compute("key", at()).sha256.released == expert.sha256


def test_what_storing_costs_counts_as_utility(tmp_path: Path) -> None:
    for stored, fails in (("float32", False), ("bfloat16", True)):
        testbed = InHalf() if stored == "bfloat16" else Plane()
        found = Workbench(Named("plane", testbed), CPU, Store(tmp_path / stored))
        cell = CellMaker(found, SUITE).compute("key", at(Shifted()))
        assert cell.logit_gap is not None
        assert cell.logit_gap < 1e-2, "in float32 it is near"
        assert ("utility-gate" in cell.flags) == fails
        assert "half-precision-loss" in cell.flags
