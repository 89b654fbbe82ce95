"""Suites: the shipped ones are valid, and a wrong one is one clear line."""

from pathlib import Path

import pytest
import torch

from benchmark.api import methods
from benchmark.core.errors import UsageError
from benchmark.core.records import OF_MODULES
from benchmark.pipeline import plan as planning
from benchmark.pipeline.suite import builtin, load

CPU = torch.device("cpu")
GOOD = """
name = "mine"
description = "mine"
testbed = "digits"
groups = [{ victim = "mnist-low", partners = ["digits-high"] }]
defenses = ["none"]
attacks = ["none"]
mergers = ["average"]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_other_modules_are_judged_by_what_reads_them_and_by_inputs() -> None:
    """Where a suite has a standard attacker; one that only measures asks no more of anybody."""
    judging, measuring = load("smoke"), load("defenses")
    for suite, more in ((judging, set(OF_MODULES)), (measuring, set())):
        asked, plain = (
            {part.spec for part in planning.attacks(suite, changes_modules=one)}
            for one in (True, False)
        )
        assert asked - plain == more


@pytest.mark.parametrize("name", builtin())
def test_every_shipped_suite_can_be_planned(name: str) -> None:
    suite = load(name)
    assert suite.name == name
    plan = planning.make(suite, CPU)
    groups = len(suite.groups) * len(suite.seeds)
    foreign = [methods.defense(spec).method.changes_modules for spec in suite.defenses]
    attacks = sum(len(planning.attacks(suite, changes_modules=one)) for one in foreign)
    assert len(plan.cells) == groups * attacks * len(suite.mergers)
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name", "nmae"), r"did you mean 'name'|name: Field required"),
        (('"average"', '"avrage"'), "did you mean 'average'"),
        (('["none"]\nattacks', '["prams"]\nattacks'), "did you mean 'params'"),
        (('"mnist-low"', '"mnist-lwo"'), "did you mean 'mnist-low'"),
        (('["digits-high"]', '["mnist-low"]'), "must all differ"),
        (('["digits-high"]', "[]"), "partners"),
        (("mergers =", "seed = [1]\nmergers ="), "did you mean 'seeds'"),
        (("mergers =", "validation_rungs = [64, 8]\nmergers ="), "must increase"),
        (("groups", "groups = 3 = 4\n#"), "not valid TOML"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in GOOD
    path = written(tmp_path, GOOD.replace(change[0], change[1], 1))
    with pytest.raises(UsageError, match=message) as caught:
        planning.make(load(path), CPU)
    assert "\n" not in str(caught.value)


def test_unknown_suites_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        load("quik")
    with pytest.raises(UsageError, match="no such suite file"):
        load(str(tmp_path / "none.toml"))


def test_the_hash_is_of_the_question_not_of_its_name(tmp_path: Path) -> None:
    first = load(written(tmp_path, GOOD))
    renamed = load(written(tmp_path, GOOD.replace('name = "mine"', 'name = "yours"')))
    other = load(written(tmp_path, GOOD.replace("average", "task-arithmetic")))
    assert first.hash == renamed.hash != other.hash


def test_parts_can_be_replaced_from_the_command_line() -> None:
    suite = planning.narrowed(load("standard"), defenses=["none"], victims=["r8"], seeds=[5])
    assert suite.defenses == ("none",)
    assert {group.victim for group in suite.groups} == {"r8"}
    assert suite.seeds == (5,)
    with pytest.raises(UsageError, match=r"no victim .r9.; known: 20ng, bbc, r8, rt"):
        planning.narrowed(load("standard"), victims=["r9"])


def test_a_key_changes_with_parameters_and_with_nothing_else(tmp_path: Path) -> None:
    def key(text: str) -> str:
        return planning.make(load(written(tmp_path, text)), CPU).cells[0].key

    assert key(GOOD) == key(GOOD)
    assert key(GOOD) != key(GOOD.replace('"average"', '"ties(density=0.3)"'))
    assert key(GOOD.replace('"average"', '"ties"')) == key(
        GOOD.replace('"average"', '"ties(density=0.2)"')
    )
