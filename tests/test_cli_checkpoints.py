"""protect, attack, merge on folders; list, show, explain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import Cli
from disk import contents, write

from benchmark.core.state import State
from benchmark.io import folders


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base, and two experts with small task vectors."""
    base = folders.load(write("bert", tmp_path / "base"))
    for seed, name in enumerate(("one", "two")):
        folders.save(_moved(base.state, seed), base, tmp_path / name)
    return tmp_path


def _moved(state: State, seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.01 * torch.randn(value.shape, generator=rng) for key, value in state.items()
    }


def _state(folder: Path) -> State:
    return folders.load(folder).state


def test_protect_then_attack(models: Path, cli: Cli) -> None:
    base, one, locked, back = (models / n for n in ("base", "one", "locked", "back"))
    arguments = (one, "--base", base, "--defense", "params", "--out", locked, "--json")
    code, text = cli("protect", *arguments)
    done = json.loads(text)
    assert code == 0
    assert done["exact"]
    assert done["logit_gap"] < 1e-4
    assert done["distance_after"] > 5 * done["distance_before"]
    assert "not-equivalent" not in done["flags"]
    code, text = cli("attack", locked, "--base", base, "--attack", "gauge-align", "--out", back)
    assert code == 0
    assert "distance from the base" in text
    assert "looks like a per-head diagonal lock with an MLP permutation; undone" in text
    recovered, expert, start = _state(back), _state(one), _state(base)
    key = "encoder.layer.0.attention.self.query.weight"
    assert (recovered[key] - start[key]).norm() < 2 * (expert[key] - start[key]).norm()


def test_locks_on_rotary_models_say_that_they_are_restricted(tmp_path: Path, cli: Cli) -> None:
    base = write("llama", tmp_path / "base")
    for spec, flagged in (("mergelock", True), ("params(scaling=none)", True), ("noise", False)):
        out = tmp_path / "out"
        arguments = ("--base", base, "--defense", spec, "--out", out, "--force", "--json")
        code, text = cli("protect", base, *arguments)
        assert code == 0
        assert ("restricted-gauge" in json.loads(text)["flags"]) is flagged
    code, text = cli(
        "protect", base, "--base", base, "--defense", "mergebarrier-taylor", "--out", tmp_path / "t"
    )
    assert code == 2
    assert "changes modules" in text
    assert not (tmp_path / "t").exists()


SAYS = {
    "auto": "looks like a per-head general lock; undone",
    "aga": "looks like a per-head general lock; undone",
    "none": "looks like a per-head general lock; not undone: ",
}


@pytest.mark.parametrize("attack", SAYS)
def test_attack_says_what_it_found(attack: str, models: Path, cli: Cli) -> None:
    base, one, locked = (models / n for n in ("base", "one", "locked"))
    assert cli("protect", one, "--base", base, "--defense", "mergelock", "--out", locked)[0] == 0
    arguments = ("--base", base, "--attack", attack, "--out", models / "back", "--json")
    code, text = cli("attack", locked, *arguments)
    found = json.loads(text)["found"]
    assert code == 0
    assert found["summary"].startswith(SAYS[attack])
    assert (found["qk"], found["vo"], found["units_moved"]) == ("general", "general", 0)
    assert found["undone"] is (attack != "none")
    assert set(found["remaining"]) == ({"query-key", "value-output"} if attack == "none" else set())
    back, start = _state(models / "back"), _state(base)
    key = "encoder.layer.0.attention.self.value.weight"
    moved = (_state(locked)[key] - start[key]).norm()
    assert set(found["gauges"]) == {"query-key", "value-output"}
    assert set(found["remaining"]) == (set(found["gauges"]) if attack == "none" else set())
    assert found["residual"] > 5 or (back[key] - start[key]).norm() < 0.1 * moved
    code, text = cli("attack", one, *arguments[:-2], models / "plain")
    assert code == 0
    assert "no lock found" in text


def test_protect_depends_on_its_seed_only(models: Path, cli: Cli) -> None:
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = (models / "one", "--base", models / "base", "--out", models / out)
        assert cli("protect", *arguments, "--defense", "params", "--seed", seed)[0] == 0
    assert contents(models / "a") == contents(models / "b")
    assert contents(models / "a") != contents(models / "c")


def test_merge_is_the_formula(models: Path, cli: Cli) -> None:
    code, text = cli(
        "merge", models / "base", models / "one", models / "two",
        "--coefficients", "0.5,0.25", "--out", models / "merged", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["setting"]["coefficients"] == [0.5, 0.25]
    base, one, two = (_state(models / name) for name in ("base", "one", "two"))
    for key, value in _state(models / "merged").items():
        expected = base[key] + 0.5 * (one[key] - base[key]) + 0.25 * (two[key] - base[key])
        torch.testing.assert_close(value, expected)


def test_merge_of_other_shards_carries_the_base_s_files(cli: Cli, tmp_path: Path) -> None:
    base = write("bert", tmp_path / "base", max_shard_size="20KB")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "tokenizer_config.json").write_text("{}")
    whole = folders.load(write("bert", tmp_path / "whole"))
    one, two = tmp_path / "one", tmp_path / "two"
    folders.save(_moved(whole.state, 0), whole, one)
    folders.save(_moved(whole.state, 1), folders.load(base), two)
    assert [folders.load(path).shards for path in (one, two)] == [1, folders.load(base).shards]
    arguments = ("--merger", "average", "--out", tmp_path / "out")
    assert cli("merge", base, one, two, *arguments)[0] == 0
    before, after = contents(base), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    weights = {name for name in before if name.endswith(".safetensors")}
    assert len(weights) > 1
    assert {name for name in before if before[name] != after[name]} == weights
    a, b, merged = _state(one), _state(two), _state(tmp_path / "out")
    for key, value in merged.items():
        torch.testing.assert_close(value, (a[key] + b[key]) / 2)


def test_merge_of_open_clip_models(cli: Cli, tmp_path: Path) -> None:
    base = folders.load(write("open-clip", tmp_path / "base"))
    for seed, name in enumerate(("one", "two")):
        folders.save(_moved(base.state, seed), base, tmp_path / name)
    paths = [tmp_path / name for name in ("base", "one", "two")]
    spec = "ties(density=0.2)"
    arguments = ("--merger", spec, "--coefficients", "1,1", "--out", tmp_path / "out")
    assert cli("merge", *paths, *arguments)[0] == 0
    assert contents(tmp_path / "out").keys() == contents(paths[0]).keys()
    merged, start = _state(tmp_path / "out"), _state(paths[0])
    moved = sum(int((merged[key] != start[key]).sum()) for key in start)
    assert 0.2 <= moved / sum(value.numel() for value in start.values()) <= 0.4


def test_coefficients_by_layer(models: Path, cli: Cli) -> None:
    paths = (models / "base", models / "one", models / "two")
    arguments = (*paths, "--coefficients", "1,0;0,1", "--out", models / "merged", "--json")
    code, text = cli("merge", *arguments)
    assert code == 0, text
    assert json.loads(text)["setting"] == {
        "coefficients": [1.0, 1.0], "layers": [[1.0, 0.0], [0.0, 1.0]],
    }  # fmt: skip
    merged, one, two = (_state(models / name) for name in ("merged", "one", "two"))
    for key, value in merged.items():
        if ".layer." in key:
            torch.testing.assert_close(value, (one if ".layer.0." in key else two)[key])


def test_average_needs_no_coefficients(models: Path, cli: Cli) -> None:
    arguments = (models / "base", models / "one", models / "two", "--out", models / "merged")
    assert cli("merge", *arguments, "--merger", "average")[0] == 0
    one, two = _state(models / "one"), _state(models / "two")
    key = "pooler.dense.weight"
    torch.testing.assert_close(_state(models / "merged")[key], (one[key] + two[key]) / 2)


USAGE = {
    "protect BASE --base BASE --defense parms --out NEW": "did you mean 'params'",
    "protect ONE --base BASE --defense params(perm=sideways) --out NEW": "perm",
    "protect ONE --base BASE --defense oracle --out NEW": "unmergebench run",
    "protect ONE --base BASE --defense params --out ONE --force": "overlaps",
    "protect ONE --base BASE --defense params --out TWO": "--force",
    "protect ONE --base BASE --defense params --out NEW --device tpu": "device",
    "attack ONE --base BASE --attack finetune-recovery --out NEW": "labeled data",
    "attack ONE --base BASE --attack gauge-alin --out NEW": "did you mean 'gauge-align'",
    "merge BASE ONE TWO --coefficients 0.5 --out NEW": "1 numbers for 2 experts",
    "merge BASE ONE TWO --coefficients a,b --out NEW": "write numbers",
    "merge BASE ONE TWO --coefficients nan,1 --out NEW": "finite",
    "merge BASE ONE TWO --out NEW": "needs --coefficients",
    "merge BASE ONE --merger ties+dare --coefficients 1 --out NEW": "compose",
    "show parms": "did you mean 'params'",
    "show defenses/gauge-align": "nothing is called",
    "show quik": "did you mean 'quick'",
    "explain utility-gat": "did you mean 'utility-gate'",
}


@pytest.mark.parametrize("line", USAGE)
def test_bad_usage_is_one_line_and_exit_2(line: str, models: Path, cli: Cli) -> None:
    before = contents(models)
    words = {name.upper(): models / name for name in ("base", "one", "two", "new")}
    code, text = cli(*(words.get(word, word) for word in line.split()))
    assert code == 2
    assert USAGE[line] in text
    assert "\n" not in text
    assert contents(models) == before


def test_members_of_another_architecture_are_refused(models: Path, cli: Cli) -> None:
    other = write("distilbert", models / "other")
    before = contents(models)
    lines = [
        ("merge", models / "base", models / "one", other, "--coefficients", "1,1"),
        ("protect", other, "--base", models / "base", "--defense", "params"),
        (
            "attack",
            models / "one",
            "--base",
            models / "base",
            "--attack",
            "aga",
            "--partner",
            other,
        ),
    ]
    for line in lines:
        code, text = cli(*line, "--out", models / "new")
        assert code == 1
        # The first of the names that differ, and how many more there are.
        assert re.search(rf"{other} lacks tensor '[^']+' \(and \d+ more\)", text)
    assert contents(models) == before


def test_a_method_that_breaks_its_contract_writes_nothing(models: Path, cli: Cli) -> None:
    (models / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from benchmark.api.contracts import Card, Defense\n"
        "@dataclass(frozen=True)\n"
        "class Halved(Defense):\n"
        "    card = Card('loses a tensor')\n"
        "    def protect(self, victim, rng):\n"
        "        return dict(list(victim.expert.items())[1:])\n"
        "@dataclass(frozen=True)\n"
        "class Wrong(Defense):\n"
        "    card = Card('claims to be exact', exact=True)\n"
        "    def protect(self, victim, rng):\n"
        "        return {k: v * 20 for k, v in victim.expert.items()}\n"
        "@dataclass(frozen=True)\n"
        "class Trains(Defense):\n"
        "    card = Card('does not say that it trains')\n"
        "    def protect(self, victim, rng):\n"
        "        return victim.train(victim.expert, rng)\n"
    )
    protect = ("protect", models / "one", "--base", models / "base", "--out", models / "new")
    code, text = cli(*protect, "--defense", f"{models / 'mine.py'}:Halved")
    assert code == 1
    assert "lacks tensor" in text
    code, text = cli(*protect, "--defense", f"{models / 'mine.py'}:Trains")
    assert code == 2
    assert "needs task data or training" in text
    assert not (models / "new").exists()
    code, text = cli(*protect, "--defense", f"{models / 'mine.py'}:Wrong", "--json")
    assert code == 0
    assert set(json.loads(text)["flags"]) >= {"not-equivalent", "norm-blow-up"}
    code, text = cli("show", f"{models / 'mine.py'}:Wrong")
    assert code == 0
    assert "claims to be exact" in text


def test_list_names_everything(cli: Cli) -> None:
    found = json.loads(cli("list", "--json")[1])
    assert {"defenses", "attacks", "mergers", "testbeds", "suites"} == set(found)
    for kind, name in (
        ("defenses", "params"), ("attacks", "gauge-align"), ("mergers", "ties"),
        ("testbeds", "minilm"), ("suites", "quick"),
    ):  # fmt: skip
        row = next(row for row in found[kind] if row["name"] == name)
        assert row["summary"]
        assert "cannot be loaded" not in row["summary"]
    access = {row["name"]: row["access"] for row in found["attacks"]}
    assert access["gauge-align"] == "weights"
    assert access["finetune-recovery"] == "labeled"
    only = cli("list", "mergers")[1]
    assert "task-arithmetic" in only
    assert "mergelock" not in only


def test_show_a_method(cli: Cli) -> None:
    (found,) = json.loads(cli("show", "params", "--json")[1])
    assert found["kind"] == "defenses"
    assert found["arxiv"] == "2503.07661"
    perm = next(p for p in found["parameters"] if p["name"] == "perm")
    assert perm["default"] == "lap_max"
    assert "random" in perm["choices"]
    assert "lap_max | random" in cli("show", "params")[1]


def test_show_a_name_of_several_kinds(cli: Cli) -> None:
    kinds = [each["kind"] for each in json.loads(cli("show", "none", "--json")[1])]
    assert kinds == ["defenses", "attacks"]
    for kind in ("attacks", "attack"):
        (found,) = json.loads(cli("show", f"{kind}/none", "--json")[1])
        assert found["kind"] == "attacks"


def test_show_a_suite(cli: Cli) -> None:
    (found,) = json.loads(cli("show", "smoke", "--json")[1])
    assert found["testbed"] == "digits"
    assert "digits" in cli("show", "smoke")[1]


def test_explain_every_flag(cli: Cli) -> None:
    from benchmark.evaluation.flags import FLAGS

    for flag in FLAGS:
        text = " ".join(cli("explain", flag)[1].split())
        assert FLAGS[flag].meaning[:40] in text
    assert json.loads(cli("explain", "no-benefit", "--json")[1])["flag"] == "no-benefit"


@pytest.mark.parametrize(
    "command", ["list", "show", "explain", "protect", "attack", "merge"]
)  # fmt: skip
def test_help_has_examples(command: str, cli: Cli) -> None:
    code, text = cli(command, "--help")
    assert code == 0
    assert f"unmergebench {command} " in text
