"""Names and specs → methods: mistakes are one line that names the remedy; ``a+b`` composes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.anatomy import Anatomy
from benchmark.api import specs
from benchmark.api.composition import AttackChain, DefenseChain, combined_card
from benchmark.api.contracts import Access, Attack, Card, Defense, Knowledge, Members, Victim
from benchmark.api.methods import ATTACKS, DEFENSES, MERGERS, TESTBEDS, attack, defense, merger
from benchmark.api.methods import testbed as the_testbed
from benchmark.api.registry import Registry
from benchmark.core.errors import AccessError, UsageError
from benchmark.core.state import State, digest

MINE = """
from dataclasses import dataclass
from typing import ClassVar, Literal
from benchmark.api.contracts import Card, Defense


@dataclass(frozen=True)
class Mine(Defense):
    strength: float = {default}
    mode: Literal["none", "hard"] = "hard"
    card: ClassVar[Card] = Card("mine")

    def protect(self, victim, rng):
        return dict(victim.expert)


class Bare(Defense):
    card = Card("no decorator")

    def protect(self, victim, rng):
        return dict(victim.expert)


class Unrelated:
    pass
"""


# Names


@pytest.mark.parametrize("registry", [DEFENSES, ATTACKS, MERGERS, TESTBEDS], ids=lambda r: r.kind)
def test_every_entry_loads_and_is_described(registry: Registry) -> None:
    assert registry.names()
    for name in registry.names():
        cls = registry.get(name)
        assert cls.card.summary
        assert cls.__dataclass_params__.frozen
        assert specs.canonical(name, registry.create(name)) == name


@pytest.mark.parametrize(
    ("build", "spec", "message"),
    [
        (defense, "parms", "unknown defense 'parms'; did you mean 'params'?"),
        (attack, "gauge-allign", "did you mean 'gauge-align'?"),
        (merger, "tise", "unknown merger 'tise'; did you mean 'ties'?"),
        (the_testbed, "minilmm", "did you mean 'minilm'?"),
        (defense, "quux", "unknown defense 'quux'; known: arf, "),
        (defense, "params(scalng=none)", "no parameter 'scalng'; did you mean 'scaling'?"),
        (defense, "params(scaling=cubic)", "parameter scaling='cubic'"),
        (defense, "params(low=abc)", "parameter low='abc'"),
        (defense, "params(tied=7)", "parameter tied=7"),
        (defense, "params(low=5, high=1)", "need 0 < low < high"),
        (merger, "ties(density=2)", "need 0 < density <= 1"),
        (defense, "params(low=1, low=2)", "'low' is given twice"),
        (defense, "params(low)", "write parameter=value"),
        (defense, "params(low=1", "unbalanced brackets"),
        (defense, "params)low(", "unbalanced brackets"),
        (defense, "params++mergelock", "empty part"),
        (defense, "", "empty part"),
        (defense, "two words", "cannot read spec"),
        (merger, "ties+dare", "mergers do not compose"),
        (attack, "auto+rinse", "is an ensemble"),
        (defense, "params+trap2", "put it first"),
        (defense, "mergebarrier-taylor+params", "put it last"),
        (the_testbed, "digits+minilm", "testbeds do not compose"),
    ],
)
def test_mistakes_name_the_remedy(build, spec: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        build(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_and_class(tmp_path: Path) -> None:
    path = tmp_path / "my_file.py"
    path.write_text(MINE.format(default=1.0))
    named = defense(f"{path}:Mine(strength=2)")
    assert named.spec == f"{path}:Mine(strength=2.0)"
    assert named.method.strength == 2  # type: ignore[attr-defined]
    assert defense(named.spec).method == named.method
    assert defense(f"{path}:Mine(mode=none)").method.mode == "none"  # type: ignore[attr-defined]
    assert isinstance(defense(f"params+{path}:Mine").method, DefenseChain)

    path.write_text(MINE.format(default=3.0))  # an edited file is loaded afresh
    fresh: Registry[Defense] = Registry("defenses", Defense)
    assert fresh.create(f"{path}:Mine").strength == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("absent.py:Mine", "no such file"),
        ("mine.py:Absent", "defines no class 'Absent'"),
        ("mine.py:Unrelated", "not a Defense subclass"),
        ("mine.py:Bare", "decorate it with @dataclass(frozen=True)"),
        ("broken.py:Mine", "cannot import"),
    ],
)
def test_bad_files(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(default=1.0))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UsageError) as caught:
        defense(f"{tmp_path / target}")
    assert message in str(caught.value)


def install(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str, type, str]) -> Registry:
    """A registry over made-up entry points: (distribution, name, class, value)."""
    points = [
        SimpleNamespace(
            name=name, value=value, dist=SimpleNamespace(name=owner), load=lambda cls=cls: cls
        )
        for owner, name, cls, value in entries
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    return Registry("defenses", Defense)


def test_third_parties_have_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = install(
        monkeypatch,
        ("unmergebench", "add", Add, "defenses.add:Add"),
        ("acme", "add", Add, "acme:Add"),
        ("acme", "wrong", Spy, "acme:Wrong"),
    )
    assert registry.names() == ["acme/add", "acme/wrong", "add"]
    assert registry.create("acme/add(amount=2)") == Add(2.0)
    with pytest.raises(UsageError, match="not a Defense subclass"):
        registry.get("acme/wrong")


def test_two_claims_to_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = ("acme", "add", Add, "acme.one:Add"), ("acme", "add", Add, "acme.two:Add")
    with pytest.raises(UsageError, match=r"'acme/add' is registered twice.*uninstall one"):
        install(monkeypatch, *twice).names()
    assert install(monkeypatch, twice[0], twice[0]).names() == ["acme/add"]


# Specs


@settings(max_examples=50, deadline=None)
@given(
    perm=st.sampled_from(["lap_max", "random", "identity"]),
    scaling=st.sampled_from(["diagonal", "symmetric", "nonsymmetric", "none"]),
    sampling=st.sampled_from([None, "uniform", "log_uniform", "beta"]),
    low=st.none() | st.floats(1e-3, 0.5),
    tied=st.booleans(),
)
def test_canonical_specs_build_the_same_method(**chosen: object) -> None:
    method = dataclasses.replace(defense("params").method, **chosen)  # type: ignore[type-var]
    spec = specs.canonical("params", method)
    assert defense(spec).method == method
    assert defense(spec).spec == spec


def test_canonical_spec_leaves_out_defaults() -> None:
    assert defense(" params( scaling = diagonal,perm=random ) ").spec == "params(perm=random)"
    assert (
        merger("ties(grid=[0, 1], normalize=TRUE)").spec == "ties(grid=(0.0, 1.0), normalize=true)"
    )
    assert defense("params + mergelock( kind=full )").spec == "params+mergelock"


# Composition


@dataclass(frozen=True)
class Add(Defense):
    amount: float = 1.0
    card: ClassVar[Card] = Card("adds", exact=True, fidelity="faithful", arxiv="1", authors="A")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {key: value + self.amount for key, value in victim.expert.items()}


@dataclass(frozen=True)
class Double(Defense):
    card: ClassVar[Card] = Card("doubles", fidelity="reconstruction", arxiv="2", role="control")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        return {key: 2 * value for key, value in victim.expert.items()}


@dataclass(frozen=True)
class Spy(Attack):
    """Doubles base and partners, adds to the release; asks for data if told to."""

    amount: float = 1.0
    reach: bool = False
    card: ClassVar[Card] = Card("spies")
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        if self.reach:
            knowledge.require(Access.LABELED, "labels")
        knowledge.budget.steps += 1
        return {key: value + self.amount * knowledge.base[key] for key, value in released.items()}

    def members(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> Members:
        recovered = self.recover(released, knowledge, rng)
        twice = tuple({k: 2 * v for k, v in p.items()} for p in knowledge.partners)
        return Members({k: 2 * v for k, v in knowledge.base.items()}, recovered, twice)


@dataclass(frozen=True)
class Refiner(Attack):
    factor: float = 3.0
    card: ClassVar[Card] = Card("refines")
    access: ClassVar[Access] = Access.LABELED

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        knowledge.require(Access.LABELED, "labels")
        return released

    def refine(self, merged: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        return {key: self.factor * value for key, value in merged.items()}


def one(value: float) -> State:
    return {"w": torch.tensor([value])}


def knowledge(access: Access) -> Knowledge:
    return Knowledge(access, one(10.0), [one(5.0)], Anatomy("none", (), ()))


def test_defenses_protect_in_turn() -> None:
    owner = Victim(one(0.0), one(3.0), *[None] * 7)  # type: ignore[arg-type]
    rng = torch.Generator()
    assert float(DefenseChain((Add(), Double())).protect(owner, rng)["w"]) == 8
    assert float(DefenseChain((Double(), Add())).protect(owner, rng)["w"]) == 7
    assert float(owner.expert["w"]) == 3


def test_composite_of_registered_defenses_equals_its_parts_in_turn() -> None:
    expert = {"w": torch.arange(4.0), "moved": torch.ones(2)}
    base = {"w": torch.zeros(4), "moved": torch.ones(2)}
    owner = Victim(base, expert, Anatomy("none", (), ()), *[None] * 6)  # type: ignore[arg-type]
    once, twice = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    composite = defense("noise(strength=1)+noise(strength=2)")
    assert composite.method.card.role == "control"
    released = composite.method.protect(owner, once)
    first = defense("noise(strength=1)").method.protect(owner, twice)
    second = defense("noise(strength=2)").method.protect(
        dataclasses.replace(owner, expert=first), twice
    )
    assert digest(released) == digest(second)


def test_cards_combine() -> None:
    card = DefenseChain((Add(), Double())).card
    assert (card.exact, card.role, card.fidelity) == (False, "method", "reconstruction")
    assert (card.summary, card.arxiv, card.authors) == ("adds, then doubles", "1, 2", "A")
    assert DefenseChain((Add(), Add())).card.exact
    assert DefenseChain((Double(), Double())).card.role == "control"
    assert combined_card([Card("a", role="reference"), Card("b", role="control")]).role == "control"
    assert combined_card([Card("a", trains=True), Card("b")]).trains
    assert defense("params+mergelock").method.card.exact


def test_attacks_recover_in_turn_on_what_the_last_one_left() -> None:
    chain = AttackChain((Spy(1.0), Spy(0.5)))
    seen = knowledge(Access.WEIGHTS)
    members = chain.members(one(1.0), seen, torch.Generator())
    assert float(members.released["w"]) == 1 + 10 + 0.5 * 20  # the second saw the doubled base
    assert float(members.base["w"]) == 40
    assert [float(p["w"]) for p in members.partners] == [20]
    assert float(chain.recover(one(1.0), seen, torch.Generator())["w"]) == 21
    assert seen.budget.steps == 4  # one budget: two attacks, run twice
    assert float(seen.base["w"]) == 10
    assert float(seen.partners[0]["w"]) == 5


def test_attacks_refine_in_turn() -> None:
    chain = AttackChain((Refiner(3.0), Spy(), Refiner(2.0)))
    seen = knowledge(Access.LABELED)
    assert float(chain.refine(one(1.0), seen, torch.Generator())["w"]) == 6
    assert chain.refines
    assert not AttackChain((Spy(), Spy())).refines


def test_a_chain_grants_no_part_more_than_its_own_tier() -> None:
    chain = AttackChain((Spy(reach=True), Refiner()))
    assert chain.access == Access.LABELED
    assert AttackChain((Spy(), Spy())).access == Access.WEIGHTS
    with pytest.raises(AccessError, match="'labeled'; only 'weights' given"):
        chain.members(one(1.0), knowledge(Access.LABELED), torch.Generator())
    with pytest.raises(AccessError):
        AttackChain((Spy(), Refiner())).members(
            one(1.0), knowledge(Access.WEIGHTS), torch.Generator()
        )


def test_attack_specs_compose() -> None:
    named = attack("gauge-align+weight-matching")
    assert named.spec == "gauge-align+weight-matching"
    assert isinstance(named.method, AttackChain)
    assert attack("gauge-align+finetune-recovery").method.access == Access.LABELED
