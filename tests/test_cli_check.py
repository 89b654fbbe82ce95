"""unmergebench check, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

from benchmark.conformance import ATTACK_CHECKS, DEFENSE_CHECKS

BROKEN = """
from dataclasses import dataclass
from benchmark.api.contracts import Card, Defense

@dataclass(frozen=True)
class Broken(Defense):
    card = Card("keeps the expert, and forgets a tensor")

    def protect(self, victim, rng):
        state = dict(victim.expert)
        state.pop(min(state))
        return state
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text(BROKEN)
    return "broken.py:Broken"


def test_a_sound_defense_exits_with_0(cli: Cli) -> None:
    code, text = cli(
        "check", "defense", "params(perm=random)", "--only", "card", "--only", "seeded"
    )
    assert code == 0
    assert "params(perm=random): 2 passed" in text
    assert text.index("card") < text.index("seeded")


def test_a_broken_one_exits_with_1_and_says_why(cli: Cli, broken: str) -> None:
    code, text = cli("check", "defense", broken, "--only", "same-tensors", "--only", "card")
    assert code == 1
    assert "lacks tensor 'embeddings.cls_token'" in text
    assert "1 passed, 1 failed" in text


def test_json(cli: Cli, broken: str) -> None:
    code, text = cli("check", "defense", broken, "--json")
    found = json.loads(text)
    assert code == 1
    assert (found["kind"], found["spec"], found["passed"]) == ("defense", broken, False)
    assert [c["check"] for c in found["checks"]] == [c.name for c in DEFENSE_CHECKS.all()]
    failed = {c["check"]: c["message"] for c in found["checks"] if c["status"] == "failed"}
    assert "lacks tensor" in failed["same-tensors"]
    assert all(c["seconds"] >= 0 for c in found["checks"])


def test_an_expected_failure_exits_with_0(cli: Cli, broken: str) -> None:
    arguments = ["check", "defense", broken, "--only", "same-tensors"]
    code, text = cli(*arguments, "--expect", "same-tensors=on purpose")
    assert code == 0
    assert "on purpose (the release lacks tensor" in " ".join(text.split())
    code, text = cli("check", "defense", "none", "--only", "card", "--expect", "card=once")
    assert code == 0
    assert "unexpected pass" in text


def test_list_names_every_check(cli: Cli) -> None:
    code, text = cli("check", "defense", "--list")
    assert code == 0
    for check in DEFENSE_CHECKS.all():
        assert check.name in text
        assert check.doc.split(",")[0][:40] in text
    code, text = cli("check", "defense", "--list", "--json")
    assert [row["check"] for row in json.loads(text)] == [c.name for c in DEFENSE_CHECKS.all()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which defense?"),
        (["parms"], "did you mean 'params'?"),
        (["params(scalling=none)"], "did you mean 'scaling'?"),
        (["gone.py:Mine"], "no such file: gone.py"),
        (["params", "--only", "equivalance"], "--only: unknown check 'equivalance'; did you mean"),
        (["params", "--expect", "pickle=no"], "--expect: unknown check 'pickle'; did you mean"),
        (["params", "--expect", "pickles"], "write CHECK=REASON"),
    ],
)
def test_a_wrong_line_is_one_error_with_exit_code_2(
    cli: Cli, arguments: list[str], message: str
) -> None:
    code, text = cli("check", "defense", *arguments)
    assert code == 2
    assert message in text
    assert "\n" not in text


def test_help_has_examples(cli: Cli) -> None:
    for kind, name in (("defense", "params"), ("attack", "gauge-align")):
        code, text = cli("check", kind, "--help")
        assert code == 0
        assert f"unmergebench check {kind} {name}" in text


# Attacks

GREEDY = """
from dataclasses import dataclass
from benchmark.api.contracts import Access, Attack, Card

@dataclass(frozen=True)
class Greedy(Attack):
    card = Card("declares weights, and wants labels")
    access = Access.WEIGHTS

    def recover(self, released, knowledge, rng):
        knowledge.labeled(4, rng)
        return dict(released)
"""


def test_a_sound_attack_exits_with_0(cli: Cli) -> None:
    code, text = cli("check", "attack", "head-norm", "--only", "equivalence", "--only", "card")
    assert code == 0
    assert "head-norm: 2 passed" in text


def test_an_attack_past_its_tier_exits_with_1(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("greedy.py").write_text(GREEDY)
    arguments = ["check", "attack", "greedy.py:Greedy", "--only", "access-tier", "--json"]
    code, text = cli(*arguments)
    found = json.loads(text)
    assert code == 1
    assert (found["kind"], found["passed"]) == ("attack", False)
    assert "needs access 'labeled'; only 'weights' given" in found["checks"][0]["message"]
    code, _ = cli(*arguments, "--expect", "access-tier=on purpose")
    assert code == 0


def test_list_names_every_check_of_attacks(cli: Cli) -> None:
    code, text = cli("check", "attack", "--list", "--json")
    assert code == 0
    assert [row["check"] for row in json.loads(text)] == [c.name for c in ATTACK_CHECKS.all()]


def test_which_attack(cli: Cli) -> None:
    code, text = cli("check", "attack")
    assert code == 2
    assert "which attack?" in text
    code, text = cli("check", "attack", "none", "--only", "shipped")
    assert code == 2
    assert "--only: unknown check 'shipped'" in text
