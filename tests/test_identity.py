"""One test per row of the table in benchmark/pipeline/identity.py: what changes a key, what not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from plane import Plane

import attacks.auto
from benchmark.api import methods
from benchmark.api.contracts import Card, Merger, Setting
from benchmark.api.methods import Named
from benchmark.core import sources
from benchmark.core.keys import sha
from benchmark.core.state import State
from benchmark.merging.linear import TaskArithmetic
from benchmark.merging.wrapped import WrappedMerger
from benchmark.pipeline import identity
from benchmark.pipeline import plan as planning
from benchmark.pipeline.candidates import Part, merges
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group, Suite, load
from benchmark.pipeline.workbench import Workbench

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
GROUP = Group(victim="a", partners=("b", "c"))

Edit = Callable[[str], None]


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Pretends that a file of the project has another line."""
    read = sources._read
    edited: set[str] = set()

    def pretend(path: str, changed: int, size: int) -> sources._Read:
        found = read(path, changed, size)
        if path in edited:
            return found._replace(content=found.content + b"\n# edited\n")
        return found

    def edit(file: str) -> None:
        assert (ROOT / file).is_file()
        edited.add(str(ROOT / file))
        sources._known.clear()

    monkeypatch.setattr(sources, "_read", pretend)
    sources._known.clear()
    yield edit
    sources._known.clear()


def key(spec: str, kind: str = "attack") -> str:
    return sha(identity.method(getattr(methods, kind)(spec).method))


def keys(suite: Suite) -> dict[tuple[str, str, str], str]:
    plan = planning.make(suite, CPU)
    return {(p.at.defense.spec, p.at.attack.spec, p.at.merger.spec): p.key for p in plan.cells}


# --- a method -------------------------------------------------------------------------------------


def test_a_method_is_its_parameters_and_its_source(edit: Edit) -> None:
    before = {spec: key(spec) for spec in ("aga", "head-norm", "low-rank", "low-rank(share=0.3)")}
    assert len(set(before.values())) == 4
    edit("attacks/aga.py")
    assert key("aga") != before["aga"]
    assert key("head-norm") == before["head-norm"]


def test_a_method_is_what_its_helpers_are(edit: Edit) -> None:
    before = key("gauge-align"), key("params", "defense")
    edit("benchmark/anatomy/alignment.py")
    assert key("gauge-align") != before[0]
    before = key("params", "defense"), key("mergelock", "defense")
    edit("defenses/rearrangement.py")
    assert key("params", "defense") != before[0]
    assert key("mergelock", "defense") == before[1]


def test_a_method_in_a_file_is_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom helper_beside import scale\n"
        "from benchmark.api import Access, Attack, Card\n\n"
        "@dataclass(frozen=True)\nclass Mine(Attack):\n"
        '    card = Card("mine")\n    access = Access.WEIGHTS\n'
        "    def recover(self, released, knowledge, rng):\n        return scale(released)\n"
    )
    helper = tmp_path / "helper_beside.py"
    helper.write_text("def scale(state):\n    return state\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        before = key(f"{tmp_path}/mine.py:Mine")
        helper.write_text("def scale(state):\n    return {k: 2 * v for k, v in state.items()}\n")
        assert key(f"{tmp_path}/mine.py:Mine") != before


def test_what_is_only_searched_is_no_part_of_a_merge_but_of_the_cell() -> None:
    plain, fewer = (methods.merger(spec).method for spec in ("ties", "ties(grid=(0.5, 1.0))"))
    assert identity.method(plain) != identity.method(fewer)
    assert identity.method(plain, search=False) == identity.method(fewer, search=False)
    # ... nor where an attack uses the merger in its own way.
    attack = methods.attack("nominal-pin").method
    wrapped = [WrappedMerger(inner, attack) for inner in (plain, fewer)]
    one, other = (identity.method(merger, search=False) for merger in wrapped)
    assert one == other
    assert identity.method(wrapped[0]) != identity.method(wrapped[1])


# --- an ensemble ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["attacks/gauge_align.py", "benchmark/anatomy/alignment.py"])
def test_the_plan_knows_what_an_ensemble_tries(edit: Edit, file: str) -> None:
    """The key of `params × auto` was the same after an edit of what auto runs first."""
    before = keys(load("smoke"))
    edit(file)
    after = keys(load("smoke"))
    assert before["params", "auto", "ties"] != after["params", "auto", "ties"]
    assert before["params", "gauge-align", "ties"] != after["params", "gauge-align", "ties"]


def test_an_edit_of_one_attack_leaves_the_cells_of_another(edit: Edit) -> None:
    before = keys(load("smoke"))
    edit("attacks/head_norm.py")
    after = keys(load("smoke"))
    assert {place[1] for place in before if before[place] != after[place]} == {"head-norm"}


@pytest.mark.parametrize(
    "change",
    [
        {"version": "99"},
        {"challengers": 3},
        {"weights": ["gauge-align", "none"]},
        {"weights": ["none", "gauge-align"]},
    ],
    ids=["version", "challengers", "members", "order"],
)
def test_an_ensemble_is_its_list(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = attacks.auto._recipe()
    seen = {key("auto")}
    monkeypatch.setattr(attacks.auto, "_recipe", lambda: {**recipe, **change})
    if "version" in change:
        monkeypatch.setattr(attacks.auto.Auto, "version", change["version"])
    seen.add(key("auto"))
    assert len(seen) == 2


# --- draws ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noisy(TaskArithmetic):
    """Adds noise; ``tries`` is searched only."""

    tries: tuple[float, ...] = field(default=(0.5, 1.0), metadata={"search": True})
    card: ClassVar[Card] = Card("noisy")
    stochastic: ClassVar[bool] = True

    def search_space(self, members: int) -> list[Setting]:
        return [Setting((c,) * members) for c in self.tries]

    def prepare(self, base, experts, knowledge, rng):
        noise = torch.randn(base["weight"].shape, generator=rng)
        return lambda setting: {**base, "weight": base["weight"] + noise}


def test_draws_do_not_hang_on_source_or_on_what_is_searched(tmp_path: Path, edit: Edit) -> None:
    """A stochastic merge keeps its draws under an attack's wrapper, an edit, another grid."""
    bench = Workbench(Named("plane", Plane()), CPU, Store(tmp_path))
    group = Group(victim="signs", partners=("order",))
    pin = methods.attack("nominal-pin").method

    def drawn(merger: Merger) -> State:
        at = Situation(
            group, 0, methods.defense("none"), methods.attack("none"), Named("noisy", merger)
        )
        parts = [Part.of(bench.expert("signs")), Part.of(bench.expert("order"))]
        (one,) = merges(bench, at, Part.of(bench.base), parts, [Setting((1.0, 1.0))], "merge")
        return one.build()

    plain = drawn(Noisy())
    assert torch.equal(plain["weight"], drawn(Noisy(tries=(0.1,)))["weight"])
    first = drawn(WrappedMerger(Noisy(), pin))
    edit("attacks/coefficients.py")
    bench.store.forget()
    assert torch.equal(first["weight"], drawn(WrappedMerger(Noisy(tries=(0.1,)), pin))["weight"])


# --- testbed, nodes, outcomes ---------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "transformers", "open_clip_torch", "peft", "numpy"])
def test_a_testbed_is_the_versions_that_run_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity.testbed(Plane(), CPU)
    found = {**identity.versions(), package: "0.0.1"}
    monkeypatch.setattr(identity, "versions", lambda: found)
    assert identity.testbed(Plane(), CPU) != before


def test_a_testbed_is_its_source_and_its_device(edit: Edit) -> None:
    before = identity.testbed(Plane(), CPU)
    assert identity.testbed(Plane(), torch.device("cuda")) != before
    edit("tests/plane.py")
    assert identity.testbed(Plane(), CPU) != before


def test_a_release_is_of_its_victim_seed_and_defense() -> None:
    params, lock = methods.defense("params"), methods.defense("mergelock")
    made = {
        identity.released(bench, defense, victim, seed)
        for bench in "xy"
        for defense in (params, lock)
        for victim in "ab"
        for seed in (0, 1)
    }
    assert len(made) == 16


def test_what_is_stored_is_of_its_dtype() -> None:
    keys = {identity.stored("made", dtype) for dtype in ("bfloat16", "float16")}
    assert len(keys | {"made", identity.stored("other", "bfloat16")}) == 4


def test_what_an_attack_recovered_is_of_all_it_saw() -> None:
    """A control was shared by victims: the attack on the base trains on the victim's data."""
    attack = methods.attack("finetune-recovery")
    groups = [GROUP, Group(victim="d", partners=("b", "c")), Group(victim="a", partners=("b",))]
    made = {
        identity.recovered(released, by, group, seed)
        for released in ("r", "s")
        for by in (attack, methods.attack("finetune-recovery(steps=3)"))
        for group in groups
        for seed in (0, 1)
    }
    assert len(made) == 24


def test_a_merge_is_not_of_what_it_leaves_out(tmp_path: Path) -> None:
    bench = Workbench(Named("plane", Plane()), CPU, Store(tmp_path))
    at = Situation(
        Group(victim="signs", partners=("order",)), 0,
        methods.defense("none"), methods.attack("none"), methods.merger("task-arithmetic"),
    )  # fmt: skip
    base, partner = Part.of(bench.base), Part.of(bench.expert("order"))
    victims = [Part(name, bench.expert("signs").state) for name in ("one", "other")]

    def contents(setting: Setting) -> set[str]:
        return {
            merges(bench, at, base, [victim, partner], [setting], "merge")[0].content
            for victim in victims
        }

    assert len(contents(Setting((0.0, 1.0)))) == 1
    assert len(contents(Setting((0.5, 1.0)))) == 2
    assert contents(Setting((0.0, 1.0))) != contents(Setting((0.0, 0.5)))


def test_outcomes_are_of_a_model_on_rows() -> None:
    made = {
        identity.outcomes(bench, model, task, split, range(*rows))
        for bench in "xy"
        for model in "mn"
        for task in "ab"
        for split in ("validation", "test")
        for rows in ((0, 8), (8, 16), (0, 16))
    }
    assert len(made) == 48


# --- a cell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"test": 100}, {"validation_rungs": (16, 32)}, {"fixed_coefficients": (0.3,)},
     {"benign": True}, {"fixed_everywhere": True}, {"seeds": (1,)}],
    ids=str,
)  # fmt: skip
def test_a_cell_is_what_the_suite_asks(change: dict) -> None:
    suite = load("smoke")
    changed = Suite.model_validate({**suite.model_dump(), **change})
    assert not set(keys(suite).values()) & set(keys(changed).values())


def test_a_cell_is_not_of_its_suite_s_name_or_neighbours() -> None:
    suite = load("smoke")
    fewer = suite.model_copy(
        update={"name": "other", "description": "x", "defenses": ("params",), "attacks": ("aga",)}
    )
    before, after = keys(suite), keys(fewer)
    assert all(before[place] == k for place, k in after.items())


def test_a_cell_is_of_the_code_that_scores(edit: Edit) -> None:
    before = keys(load("smoke"))
    edit("benchmark/evaluation/scoring.py")
    after = keys(load("smoke"))
    assert not set(before.values()) & set(after.values())


def test_keys_do_not_depend_on_the_order_of_names() -> None:
    assert sha({"a": 1, "b": 2}) == sha({"b": 2, "a": 1})
    assert sha([1, 2]) != sha([2, 1])
    assert sha("ab", "c") != sha("a", "bc")
