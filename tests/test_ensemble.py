"""The standard attacker on `digits`: what it tries, what it costs, what it finds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from attacks.auto import Auto
from benchmark.api import methods
from benchmark.api.contracts import Access, Card, Ensemble, Setting
from benchmark.core.errors import AssetError
from benchmark.core.records import Cell
from benchmark.pipeline import plan as planning
from benchmark.pipeline import run as running
from benchmark.pipeline.ensemble import representative
from benchmark.pipeline.suite import Suite, load

CPU = torch.device("cpu")
MERGERS = ("task-arithmetic", "task-arithmetic(fixed=0.8)", "ties")
# A defense that no alignment undoes, so that the whole ensemble runs.
HELD = "noise"
MEMBERS = ("gauge-align", "weight-matching", "layer-subset")

FAILING = """
from dataclasses import dataclass
from attacks.auto import Auto

@dataclass(frozen=True)
class Partly(Auto):
    @property
    def candidates(self):
        return ("none", "collusion(mode=locate)+low-rank", "gauge-align", "head-norm")

@dataclass(frozen=True)
class Broken(Auto):
    @property
    def candidates(self):
        return ("{path}:Raises", "{path}:Raises")
"""
RAISES = """
from dataclasses import dataclass
from benchmark.api.contracts import Access, Attack, Card
from benchmark.core.errors import MethodError

@dataclass(frozen=True)
class Raises(Attack):
    card = Card("raises")
    access = Access.WEIGHTS
    def recover(self, released, knowledge, rng):
        raise MethodError("no luck")
"""


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    return home


def run(folder: Path, **fields: object) -> dict[tuple[str, str, str], Cell]:
    base = {**load("smoke").model_dump(), "test": 200, "validation_rungs": (8, 32, 64)}
    suite = Suite.model_validate({**base, **fields})
    try:
        cells = running.execute(planning.make(suite, CPU), folder, CPU)
    except AssetError as error:
        pytest.skip(f"the data of `digits` is not to be had here: {error}")
    return {(c.defense, c.attack, c.merger): c for c in cells}


@pytest.fixture(scope="module")
def cells(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Cell]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        return run(
            tmp_path_factory.mktemp("runs") / "auto",
            defenses=("none", "mergelock", "params+mergelock", HELD),
            attacks=("none", "auto", *MEMBERS),
            mergers=MERGERS,
        )


def test_every_candidate_resolves_and_stays_in_its_tier() -> None:
    for tier in ("weights", "unlabeled", "labeled"):
        auto = Auto(tier)  # type: ignore[arg-type]
        allowed = Access[tier.upper()]
        found = [methods.attack(spec) for spec in auto.candidates]
        assert max(named.method.access for named in found) == auto.access == allowed
        assert len({named.spec for named in found}) == len(found)
        assert [named.spec for named in found] == list(auto.candidates), "specs are canonical"
    assert set(Auto("weights").candidates) < set(Auto("labeled").candidates)


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("lock", ["mergelock", "params+mergelock"])
def test_it_breaks_the_locks(
    cells: dict[tuple[str, str, str], Cell], lock: str, merger: str
) -> None:
    found = cells[lock, "auto", merger]
    assert found.status == "ok"
    assert found.protection is not None
    assert found.protection <= 0.1
    assert cells[lock, "none", merger].protection >= 0.9
    assert found.ensemble["version"] == Auto.version
    winner = str(found.ensemble["winner"])
    assert winner in Auto().candidates
    assert winner != "none"


@pytest.mark.parametrize("merger", MERGERS)
def test_the_finalists_are_the_first_and_the_best_of_the_others(
    cells: dict[tuple[str, str, str], Cell], merger: str
) -> None:
    found = cells[HELD, "auto", merger].ensemble
    assert not found["stopped"]
    scores, (first, challenger) = found["scores"], found["finalists"]  # type: ignore[misc]
    assert isinstance(scores, dict)
    assert first == Auto().candidates[0]
    # The screening's race names it: the best of those that saw most.
    assert challenger == next(spec for spec in scores if spec != first)
    assert found["winner"] in (first, challenger)
    auto = cells[HELD, "auto", merger].protection
    # Chosen on 32 validation examples, measured on 200 test examples: near the best member's.
    best = min(cells[HELD, spec, merger].protection for spec in MEMBERS)
    assert auto <= best + 0.1


@pytest.mark.parametrize("merger", MERGERS)
def test_it_costs_about_three_searches(
    cells: dict[tuple[str, str, str], Cell], merger: str
) -> None:
    found = cells[HELD, "auto", merger].ensemble
    # Screening costs as much whatever the merger; one with fixed coefficients has little to search.
    times = 5 if "fixed" in merger else 3.5
    assert found["member_passes"] < found["passes"] <= times * found["member_passes"]  # type: ignore[operator]


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("lock", ["none", "mergelock", "params+mergelock"])
def test_it_stops_where_its_first_candidate_undoes_the_defense(
    cells: dict[tuple[str, str, str], Cell], lock: str, merger: str
) -> None:
    cell = cells[lock, "auto", merger]
    found = cell.ensemble
    assert found["stopped"]
    assert found["winner"] == Auto().candidates[0]
    assert found["finalists"] == [found["winner"]]
    assert 0 < found["passes"] == found["member_passes"]  # type: ignore[operator]
    assert cell.protection == cells[lock, "gauge-align", merger].protection


def test_pinning_does_not_apply_where_coefficients_are_fixed(
    cells: dict[tuple[str, str, str], Cell],
) -> None:
    failed = cells[HELD, "auto", "task-arithmetic(fixed=0.8)"].ensemble["failed"]
    assert failed == dict.fromkeys(
        ("coefficients", "gauge-align+coefficients"), "the merger's coefficients are fixed"
    )


def test_the_report_names_the_winner(cells: dict[tuple[str, str, str], Cell]) -> None:
    from benchmark.reporting.ranking import rank

    board = rank([cell for (_, attack, _), cell in cells.items() if attack in ("none", "auto")])
    entry = next(
        e for e in board.matrix if (e.defense, e.attack, e.merger) == ("mergelock", "auto", "ties")
    )
    winner = cells["mergelock", "auto", "ties"].ensemble["winner"]
    assert entry.winners == {winner: 1}
    assert entry.attacker == f"auto: {winner}"


def test_a_member_that_fails_is_noted_and_all_failing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(RAISES)
    (tmp_path / "partly.py").write_text(
        FAILING.replace("collusion(mode=locate)+low-rank", f"{tmp_path}/raises.py:Raises").replace(
            "{path}", f"{tmp_path}/raises.py"
        )
    )
    partly, broken = (f"{tmp_path}/partly.py:{name}" for name in ("Partly", "Broken"))
    found = run(
        tmp_path / "run",
        defenses=("mergelock",),
        attacks=(partly, broken),
        mergers=("task-arithmetic",),
    )
    some = found["mergelock", partly, "task-arithmetic"]
    assert some.status == "ok"
    assert some.ensemble["winner"] == "gauge-align"
    assert some.ensemble["failed"] == {f"{tmp_path}/raises.py:Raises": "no luck"}
    none = found["mergelock", broken, "task-arithmetic"]
    assert none.status == "error"
    assert "every attack" in none.reason


@pytest.mark.slow
def test_data_counts_only_beyond_what_it_gives_the_base(tmp_path: Path) -> None:
    """Many labels on the victim's task make an expert of the base: then rinsing gains nothing."""
    found = run(
        tmp_path / "run",
        defenses=("none", "mergelock"),
        attacks=("none", "rinse(per_class=64, steps=60)"),
        mergers=("task-arithmetic",),
    )
    rinsed = found["mergelock", "rinse(per_class=64, steps=60)", "task-arithmetic"]
    plain = found["mergelock", "none", "task-arithmetic"]
    assert rinsed.gain_outside > plain.gain_outside + 0.02
    assert rinsed.outside_choice.startswith(("control", "partners", "released"))
    assert rinsed.budget.examples == 64 * 5
    assert rinsed.budget.steps == 60
    assert rinsed.budget.flops > 0


def test_screening_settings() -> None:
    grid = [Setting((v, p)) for v in (0.0, 0.5, 1.0) for p in (0.0, 0.5, 1.0)]
    assert representative(grid, Setting((0.5, 1.0))) == [Setting((0.5, 1.0)), Setting((1.0, 0.5))]
    assert representative(grid, Setting((1.0, 0.5))) == [Setting((1.0, 0.5))]
    assert representative(grid, Setting((0.7, 0.7))) == [Setting((1.0, 0.5))]
    assert representative(grid, None) == [Setting((1.0, 0.5))]


def test_without_data_it_runs_its_first_candidate() -> None:
    @dataclass(frozen=True)
    class Other(Ensemble):
        card: ClassVar[Card] = Card("another ensemble")
        version: ClassVar[str] = "0"

    assert Other.__abstractmethods__ >= {"candidates", "challengers", "recover"}
    assert Auto().candidates[0] == "gauge-align"
    assert dataclasses.replace(Auto(), tier="labeled").access == Access.LABELED
