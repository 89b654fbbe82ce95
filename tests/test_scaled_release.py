"""θ0 + c·τ of the release, without any partner: what every free-rider tries beside merging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_nodes import GROUP, SUITE, at, bench

from benchmark.api.contracts import Card, Defense, Victim
from benchmark.api.methods import attack
from benchmark.core.state import State
from benchmark.pipeline import candidates as made
from benchmark.pipeline.candidates import SCALES, Candidate
from benchmark.pipeline.cells import CellMaker
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.workbench import Workbench


@dataclass(frozen=True)
class Far(Defense):
    """θ0 + 2τ: half of it is the expert."""

    card: ClassVar[Card] = Card("too far")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        key = "weight"
        return {**victim.expert, key: 2 * victim.expert[key] - victim.base[key]}


def scaled(workbench: Workbench, where: Situation) -> list[Candidate]:
    base, parts = made.members(workbench.recovered(where))
    space = where.merger.method.search_space(2)
    return made.scaled(workbench, where, base, parts, space, "merge")


def test_the_release_is_tried_at_other_lengths(tmp_path: Path) -> None:
    workbench = bench(tmp_path)
    base, expert = workbench.base.state(), workbench.expert(GROUP.victim).state()
    found = {c.setting.coefficients: c for c in scaled(workbench, at(Far())) if c.setting}
    assert list(found) == [(c, 0.0) for c in SCALES]
    assert 1.0 not in SCALES, "that is the release: an outside option"
    for (c, _), candidate in found.items():
        wanted = base["weight"] + 2 * c * (expert["weight"] - base["weight"])
        torch.testing.assert_close(candidate.build()["weight"], wanted)


@pytest.mark.parametrize("name", ["ties", "slerp", "dare", "fisher", "ensemble"])
def test_it_is_one_model_for_all_mergers_and_seeds(tmp_path: Path, name: str) -> None:
    workbench = bench(tmp_path)
    plain, other = (scaled(workbench, at(Far(), through=m)) for m in ("task-arithmetic", name))
    assert [c.content for c in plain] == [c.content for c in other]
    assert len(plain) == len(SCALES) <= 3


@pytest.mark.parametrize("name", ["task-arithmetic(fixed=0.8)", "average", "model-stock"])
def test_where_no_coefficient_is_searched_there_is_nothing_but_the_merge(
    tmp_path: Path, name: str
) -> None:
    assert scaled(bench(tmp_path), at(Far(), through=name)) == []


def test_a_cell_counts_them_as_merges_and_not_as_outside_options(tmp_path: Path) -> None:
    maker = CellMaker(bench(tmp_path), SUITE)
    undefended, far, fixed = (
        maker.compute(name, where)
        for name, where in (
            ("undefended", at()),
            ("far", at(Far())),
            ("fixed", at(Far(), through="task-arithmetic(fixed=0.8)")),
        )
    )
    both = 4  # (0.5, 1) for each member
    assert undefended.search.settings == far.search.settings == both + len(SCALES)
    assert fixed.search.settings == 1
    outside = made.outside(maker.bench, at(Far()), at().merger.method.search_space(2))
    tried = {option.content for option in scaled(maker.bench, at(Far()))}
    assert not tried & {option.content for option in outside}
    # More to choose from on validation, so never less there.
    free, only = (maker.rider.solve(at(Far(), through=m)) for m in ("task-arithmetic", "average"))
    assert free.score >= only.score


def test_what_data_makes_of_the_base_is_scaled_too(tmp_path: Path) -> None:
    """Else a gain of scaling what the attacker trained himself would count as one of merging."""
    workbench = bench(tmp_path)
    where = at(by=attack("rinse(steps=2)").method)
    options = made.controls(workbench, where, where.merger.method.search_space(2))
    found = [option.setting.coefficients for option in options if option.setting]
    assert [c for c in found if not c[1]] == [(c, 0.0) for c in SCALES]
    assert {option.kind for option in options} == {"control"}
