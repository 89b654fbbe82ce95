"""The papers' protocols: every suite in full at toy size, and the printed figures beside ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy_clip
from fabricated import cell

from benchmark import reporting
from benchmark.api import methods
from benchmark.core.records import SEARCHED, Cell
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.run import read_cells
from benchmark.pipeline.suite import Group, Suite, load
from benchmark.reporting import write
from benchmark.reporting.html import suite_toml
from benchmark.reporting.published import published_lines

PAPERS = ("params-paper", "trap2-paper", "mergeguard-paper", "aga-paper")
CPU = torch.device("cpu")
#: What printed figures of the toy run may be of.
TOY = ("mean", "all", "eurosat", "svhn")
TASKS = {"mnist": 10, "svhn": 10, "eurosat": 10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("toy")
    for seed, (task, classes) in enumerate(TASKS.items()):
        toy_clip.parquet(home / "data" / task, classes, seed=seed)
    return {"data": home / "data", "weights": toy_clip.open_clip_folder(home / "weights")}


def small(name: str, folders: dict[str, Path]) -> Suite:
    """The suite itself on toy weights and images, for the victim EuroSAT."""
    suite = load(name)
    spec = suite.testbed.removesuffix(")")
    spec += ", " if "(" in spec else "("
    # LoRA keeps its rate: at a greater one these tiny experts get nothing right.
    training = "steps=4" if "lora" in spec else "steps=20, learning_rate=0.005"
    spec += f"data={folders['data']}, weights={folders['weights']}, {training})"
    pair = len(suite.groups[0].partners) == 1
    group = {"victim": "eurosat", "partners": ["svhn"] if pair else ["svhn", "mnist"]}
    return Suite.model_validate(
        {
            **suite.model_dump(),
            "testbed": spec,
            # What learns its coefficients learns for less long.
            "mergers": [
                f"{m}(steps=4)" if m in ("adamerging", "prodistill") else m for m in suite.mergers
            ],
            "published": [
                f.model_copy(update={"merger": "prodistill(steps=4)"})
                if f.merger == "prodistill"
                else f
                for f in suite.published
            ],
            "groups": [group],
            "test": 20,
            "validation_rungs": [4, 8],
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_in_full_at_toy_size(
    name: str,
    folders: dict[str, Path],
    tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
) -> None:
    suite = small(name, folders)
    file = tmp_path / "toy.toml"
    file.write_text(suite_toml(suite.model_dump(mode="json")))
    assert load(str(file)) == suite
    code, output = cli("run", file, "--out", tmp_path / "run")
    cells = read_cells(tmp_path / "run")
    assert [c.reason for c in cells if c.status not in ("ok", "no-benefit")] == []
    assert code == 0, output
    assert "The papers' figures beside ours" in output
    wanted = len(suite.defenses) * len(suite.attacks) * len(suite.mergers)
    assert len(cells) == wanted
    coefficients = {f"{c:g}" for c in suite.fixed_coefficients}
    coefficients |= {SEARCHED} if suite.shared_search else set()
    for c in cells:
        assert set(c.fixed) == (
            coefficients if suite.fixed_everywhere or c.attack == "none" else set()
        )
    board = json.loads((tmp_path / "run/leaderboard.json").read_text())
    measured = [line for line in board["published"] if line["remark"] != "not on this testbed"]
    own = [line for line in measured if line["printed"]["task"] in TOY]
    assert own
    for line in own:
        for which in ("unprotected", "protected", "attacked"):
            printed, here = line["printed"][which], line["measured"][which]
            assert (printed is None) == (here is None)
            assert here is None or 0 <= here <= 100
    alone = [line["measured"] for line in own if line["printed"]["what"] == "standalone"]
    if name in ("aga-paper", "mergeguard-paper"):  # whose experts learn the stripes in 20 steps
        assert max(m["unprotected"] or m["attacked"] or 0 for m in alone) >= 50
    page = (tmp_path / "run/report.html").read_text()
    for line in own:
        assert f"arXiv {line['printed']['arxiv']} [{line['printed']['evidence']}]" in page
        figures = [line[side][which] for side in ("printed", "measured")
                   for which in ("unprotected", "protected", "attacked")]  # fmt: skip
        assert all(f"{value:.2f}" in page for value in figures if value is not None)
    # The page and the JSON come from the cells alone, and can be made again.
    assert json.loads(cli("report", tmp_path / "run", "--json")[1]) == board


@pytest.mark.parametrize("name", PAPERS)
def test_figures_name_methods_as_cells_do(name: str) -> None:
    suite = load(name)
    assert suite.published
    tasks = {group.victim for group in suite.groups}
    for figure in suite.published:
        assert methods.defense(figure.defense).spec == figure.defense
        assert methods.attack(figure.attack).spec == figure.attack
        assert methods.merger(figure.merger).spec == figure.merger
        if figure.testbed in ("", suite.testbed):
            assert figure.defense in suite.defenses
            assert figure.attack in suite.attacks
            assert figure.merger in suite.mergers
            assert figure.task in {"mean", "all", *tasks}
            assert figure.coefficient in {None, *suite.fixed_coefficients}


# -- what stands beside a printed figure ----------------------------------------------------------


def figure(**fields: object) -> dict[str, object]:
    return {
        "defense": "params", "coefficient": 0.8, "unprotected": 70.0, "protected": 1.0,
        "evidence": "note", "source": "PaRaMS", "arxiv": "2503.07661", **fields,
    }  # fmt: skip


def lines(cells: list[Cell], *figures: dict[str, object], testbed: str = "minilm") -> list[tuple]:
    suite = {"testbed": testbed, "fixed_coefficients": [0.3, 0.8], "published": list(figures)}
    found = published_lines(cells, {"suite": suite})
    return [
        (x.measured.unprotected, x.measured.protected, x.measured.attacked, x.remark) for x in found
    ]


def made(defense: str, attack: str = "none", **fields: object) -> Cell:
    return cell(defense, attack, "task-arithmetic", 0.5).model_copy(update=fields)


def test_a_shared_coefficient_is_the_best_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mean over all tasks; ten in turn that are no better end the search."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(tmp_path / "cache"))
    fields = {
        "name": "s", "description": "s", "testbed": "digits",
        "groups": (Group(victim="mnist-low", partners=("digits-low",)),),
        "defenses": ("none", "params"),
        "attacks": ("none", "weight-matching"), "mergers": ("task-arithmetic",), "test": 60,
        "validation_rungs": (20, 60), "fixed_everywhere": True,
    }  # fmt: skip
    tried = tuple(n / 10 for n in range(1, 60))
    both = {"shared_search": tried, "fixed_coefficients": tried[:20]}
    plan = planning.make(Suite.model_validate({**fields, **both}), CPU)
    alone = planning.make(Suite.model_validate({**fields, "fixed_coefficients": tried[:20]}), CPU)
    assert plan.cells[0].key != alone.cells[0].key
    for one in running.execute(plan, tmp_path / "run", CPU):
        assert one.status in ("ok", "no-benefit"), one.reason
        found = one.fixed[SEARCHED]
        assert found.keys() == {"mnist-low", "digits-low"}
        chosen = one.notes["fixed.searched"]
        assert found == one.fixed.get(f"{chosen:g}", found)
        if one.defense == "none":
            assert 0.2 <= chosen <= 1.5
            assert sum(found.values()) > sum(one.fixed["0.1"].values())
    write(tmp_path / "run", read_cells(tmp_path / "run"), {})
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert SEARCHED in page


def test_all_is_the_mean_over_the_tasks_of_a_merge() -> None:
    cells = [
        made("none", fixed={SEARCHED: {"r8": 0.75, "bbc": 0.25}}),
        made("params", fixed={SEARCHED: {"r8": 0.0, "bbc": 0.5}}),
    ]
    found = figure(task="all", coefficient=None)
    run = {"suite": {"testbed": "minilm", "shared_search": [0.1], "published": [found]}}
    (line,) = published_lines(cells, run)
    assert (line.measured.unprotected, line.measured.protected) == (50, 25)
    assert (line.remark, line.measured.coefficient) == ("", SEARCHED)


def test_the_mean_is_over_victims_and_seeds_at_the_printed_coefficient() -> None:
    cells = [
        made("none", fixed={"0.3": {"r8": 0.1}, "0.8": {"r8": 0.9}}),
        made("none", victim="bbc", partners=["r8"], fixed={"0.8": {"bbc": 0.5}}),
        made("params", fixed={"0.3": {"r8": 0.25}, "0.8": {"r8": 0.125}}),
    ]
    assert lines(cells, figure()) == [(pytest.approx(70.0), 12.5, None, "")]
    assert lines(cells, figure(task="bbc")) == [(50.0, None, None, "")]
    assert lines(cells, figure(task="r8", partners=["rt"])) == [(None, None, None, "")]
    (silent,) = lines(cells, figure(coefficient=None, task="r8"))
    assert silent[:2] == (10.0, 25.0)
    assert "λ 0.3 is ours" in silent[3]


def test_a_partner_is_measured_in_its_own_merge() -> None:
    cells = [made("none", fixed={"0.8": {"r8": 0.9, "bbc": 0.5}})]
    assert lines(cells, figure(task="bbc", victim="r8", partners=["bbc"]))[0][0] == 50.0
    assert lines(cells, figure(task="bbc", victim="r8", partners=["rt"]))[0][0] is None


def test_alone_and_after_an_attack() -> None:
    cells = [
        made("none", utility=0.9),
        made("params", utility=0.8, fixed={"0.8": {"r8": 0.1}}),
        made("params", "aga", standalone=0.6, fixed={"0.8": {"r8": 0.7}}),
    ]
    alone = figure(what="standalone", attack="aga", attacked=60.0)
    assert lines(cells, alone) == [(90.0, 80.0, 60.0, "")]
    merged = figure(attack="aga", attacked=60.0, unprotected=None)
    assert lines(cells, merged) == [(None, 10.0, 70.0, "")]


@pytest.mark.parametrize(
    ("testbed", "of", "same"),
    [
        ("minilm", "", True),
        ("minilm(tokens=16)", "minilm", True),
        ("minilm(tokens=16)", "minilm(tokens=16)", True),
        ("minilm", "minilm(tokens=16)", False),
        ("minilm", "digits", False),
        ("minilm", "Llama-2 chat", False),
    ],
)
def test_figures_of_another_base_are_not_compared(testbed: str, of: str, same: bool) -> None:
    cells = [made("params", fixed={"0.8": {"r8": 0.1}})]
    ((_, protected, _, remark),) = lines(cells, figure(testbed=of), testbed=testbed)
    assert (protected, remark) == ((10.0, "") if same else (None, "not on this testbed"))


def test_printed_figures_are_no_part_of_the_question(tmp_path: Path) -> None:
    suite = load("aga-paper")
    assert suite.hash == suite.model_copy(update={"published": ()}).hash
    assert suite.hash != suite.model_copy(update={"fixed_everywhere": False}).hash
    # The hash this suite had before suites could hold such figures.
    assert load("smoke").hash == "ef1e9ac92227e30b6d707142af89340c98654ed63cda86637ccea45d20bb80b1"


def test_a_page_without_figures_has_no_such_table(tmp_path: Path) -> None:
    cells = [made("none"), made("params")]
    board = reporting.write(
        tmp_path,
        cells,
        {"suite": {"testbed": "minilm"}},
        lambda spec: methods.defense(spec).method.card,
    )
    assert board.published == []
    assert "beside ours" not in (tmp_path / "report.html").read_text()
