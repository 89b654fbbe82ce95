"""Who has a rank: the gate, what must be covered, tracks. Cells are made up, most by a cheat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fabricated import EMPTIED, EXPERT, NO_BENEFIT, cards, cell, counted, modules, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.core.records import Cell
from benchmark.evaluation.flags import of_cell
from benchmark.evaluation.statistics import aggregate
from benchmark.reporting.board import Row
from benchmark.reporting.ranking import rank
from benchmark.reporting.summary import verdict

few = settings(deadline=None, max_examples=25)


def row(cells: list[Cell], defense: str = "params") -> Row:
    return next(row for row in rank(cells, cards).rows if row.defense == defense)


def places() -> Iterator[dict[str, object]]:
    """24 places of a suite."""
    for attack in ("none", "aga", "gauge-align", "head-norm"):
        for merger in ("ties", "average"):
            for seed in range(3):
                yield {"attack": attack, "merger": merger, "seed": seed}


# -- the utility gate ---------------------------------------------------------------------------


def test_three_of_200_are_within_the_gate_whatever_the_expert_has() -> None:
    """A drop of exactly 1.5 points was flagged for 141 of 198 expert accuracies."""
    rng = np.random.default_rng(0)
    made, card = cell(n=200), cards("params")
    for expert in range(4, 201):
        made.correct["expert"]["r8"] = outcomes(expert / 200, 200, rng)
        for lost, flagged in ((3, False), (4, True)):
            made.correct["released"] = {"r8": outcomes((expert - lost) / 200, 200, rng)}
            assert ("utility-gate" in of_cell(made, card, growth=1.0)) == flagged, expert


@given(st.lists(st.tuples(st.integers(4, 200), st.integers(0, 200)), min_size=1, max_size=5))
@few
def test_one_mean_decides_flag_standing_and_words(victims: list[tuple[int, int]]) -> None:
    cells = [counted(expert, min(expert + 5, released), seed=seed)
             for seed, (expert, released) in enumerate(victims)]  # fmt: skip
    for one in cells:
        one.flags = of_cell(one, cards("params"), growth=1.0)
    found = row(cells)
    lost = sum(e - min(e + 5, r) for e, r in victims)
    fails = lost > 3 * len(victims)  # of 200 examples each
    assert ("utility-gate" in found.flags) == fails == (found.standing == "below-gate")
    assert found.drop == pytest.approx(lost / 2 / len(victims))
    if fails:
        stated = float(found.reason.removeprefix("fails the utility gate: ").split()[0])
        assert stated > 1.5
        assert stated == pytest.approx(lost / 2 / len(victims), abs=0.051)
        assert found.reason.endswith("points lost, 1.5 allowed")
    else:
        assert found.standing == "ranked"


def test_one_victim_over_the_gate_is_no_verdict_on_the_row() -> None:
    """ "below-gate: 0.8 points lost, 1.5 allowed" was printed: a cell's flag decided the row."""
    cells = [counted(190, 187 + 3, seed=0), counted(190, 186, seed=1), counted(190, 190, seed=2)]
    for one in cells:
        one.flags = of_cell(one, cards("params"), growth=1.0)
    assert [one.flags for one in cells] == [[], ["utility-gate"], []]
    found = row(cells)
    assert (found.standing, found.flags) == ("ranked", [])
    assert found.drop == pytest.approx(2 / 3)


def test_what_is_hardly_over_the_gate_is_seen_over_it() -> None:
    cells = [counted(190, 187, seed=s) for s in range(49)] + [counted(190, 186, seed=49)]
    found = row(cells)
    assert found.reason == "fails the utility gate: 1.51 points lost, 1.5 allowed"


def test_several_claims_about_one_release_count_as_the_worst() -> None:
    honest, kind = counted(190, 150), counted(190, 190, attack="aga")
    for cells in ([honest, kind], [kind, honest]):
        assert row(cells).standing == "below-gate"


def test_an_unmeasured_release_has_no_rank() -> None:
    silent = cell(seed=1)
    del silent.correct["released"]
    found = row([cell(), silent])
    assert (found.standing, found.reason) == (
        "unranked",
        "the release's own accuracy was not measured",
    )


def test_an_attack_is_destructive_by_the_same_counts() -> None:
    def recovered(right: int, seed: int = 0) -> Cell:
        made = counted(190, 190, defense="none", attack="aga", seed=seed)
        made.standalone = right / 200
        return made

    assert of_cell(recovered(187), cards("none"), growth=1.0) == []
    assert of_cell(recovered(186), cards("none"), growth=1.0) == ["destructive-attack"]
    assert rank([recovered(187)], cards).attack_flags == {}
    assert rank([recovered(186), recovered(190, 1)], cards).attack_flags == {}
    assert rank([recovered(186)], cards).attack_flags == {"aga": ["destructive-attack"]}
    defended = recovered(100).model_copy(update={"defense": "params"})
    assert "destructive-attack" not in of_cell(defended, cards("params"), growth=1.0)


# -- which cells count --------------------------------------------------------------------------


def test_a_release_that_empties_its_cells_has_no_rank() -> None:
    """One of 24 cells was "ok", with protection 1, and that ranked first."""
    honest = [cell("honest", protection=0.4, **at) for at in places()]  # type: ignore[arg-type]
    cheat = [cell("cheat", protection=1.0, **at, **EMPTIED) for at in places()]  # type: ignore[arg-type]
    cheat[0] = cell("cheat", protection=1.0, **next(places()))  # type: ignore[arg-type]
    found = row([*honest, *cheat], "cheat")
    assert found.standing == "unranked"
    assert found.covered == pytest.approx(1 / 24)
    assert found.reason == (
        "cells that count hold 4 % of the suite's benefit of merging, a rank needs 50 %"
    )
    assert "outside-raised" in found.flags
    assert found.robust["weights"].protection == 0
    assert row([*honest, *cheat], "honest").place == "1"
    assert row(cheat, "cheat").standing == "unranked"  # alone, it is no better off


def test_an_emptied_cell_weighs_as_much_as_it_would_have() -> None:
    full, emptied = cell(protection=1.0), cell(protection=1.0, seed=1, **EMPTIED)
    assert emptied.protection == 0
    assert emptied.protection_ci == (0, 0)
    found = aggregate([full, emptied])
    assert found.estimate.value == pytest.approx(0.5, abs=0.01)
    assert (found.cells, found.no_benefit) == (2, 0)


@given(st.floats(0, 1))
@few
def test_raising_the_outside_option_never_helps(share: float) -> None:
    """The release gives away a share of what merging would have gained; no attack gains more."""
    undefended, reference = {"r8": 0.92, "bbc": 0.93}, {"r8": 0.60, "bbc": 0.90}
    outside = {t: reference[t] + share * (undefended[t] - reference[t]) for t in EXPERT}
    cheat = cell(protection=1.0, outside=outside)
    given_away = (cheat.gain_outside or 0) - (cheat.gain_reference or 0)
    benefit = (cheat.gain_undefended or 0) - (cheat.gain_reference or 0)
    assert cheat.protection is not None
    # 0.02 may be measurement; the rest counts as gained by the free-rider.
    assert cheat.protection <= 1 - (given_away - 0.02) / benefit + 0.05
    assert ("outside-raised" in of_cell(cheat, cards("params"), growth=1.0)) == (
        given_away > 0.02 + 1e-9
    )


def test_a_stated_status_does_not_take_a_cell_out() -> None:
    weak = cell("params", "aga", protection=0.0, status="no-benefit")
    found = row([cell(), weak])
    assert found.robust["weights"].protection == pytest.approx(0)
    assert "no-benefit" not in found.flags


def test_skipped_cells_hold_no_benefit_where_others_had_some() -> None:
    honest = [cell("honest", protection=0.5, **at) for at in places()]  # type: ignore[arg-type]
    picky = [
        cell("picky", protection=0.9, **at, status="skipped" if number > 9 else "ok")  # type: ignore[arg-type]
        for number, at in enumerate(places())
    ]
    assert row([*honest, *picky], "picky").standing == "unranked"
    assert row([*honest, *picky], "honest").place == "1"
    # What nobody could merge held nothing.
    everyone = [one.model_copy(update={"defense": "honest"}) for one in picky]
    assert {r.standing for r in rank([*everyone, *picky], cards).rows} == {"ranked"}


def test_places_without_benefit_do_not_count_against_anyone() -> None:
    cells = [
        cell(protection=0.5, **at, **(NO_BENEFIT if number > 3 else {}))  # type: ignore[arg-type]
        for number, at in enumerate(places())
    ]
    found = row(cells)
    assert (found.standing, found.covered) == ("ranked", 1.0)


def test_a_tier_that_was_left_out_costs_the_rank_and_shows_no_number() -> None:
    full = [cell("full", a, protection=0.5) for a in ("none", "finetune-recovery")]
    found = row([*full, cell("less", protection=1.0)], "less")
    assert (found.standing, found.reason) == ("unranked", "1 of 2 cells are missing")
    assert set(found.robust) == {"weights"}


# -- releases with modules of their own ---------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "missing"),
    [("read-shipped", "attack read-shipped"), ("layer-refit", "attacks with unlabeled data")],
)
def test_mandatory_cells_of_other_modules(attack: str, missing: str) -> None:
    assert row(modules(), "foreign").place == "1"
    found = row([c for c in modules() if c.attack != attack], "foreign")
    assert (found.standing, found.reason) == ("unranked", f"mandatory cells missing: {missing}")
    skipped = [
        c.model_copy(update={"status": "skipped"} if c.attack == attack else {}) for c in modules()
    ]
    assert row(skipped, "foreign").reason == f"mandatory cells missing: {missing}"
    # On one victim only is not enough.
    more = [c.model_copy(update={"seed": 1}) for c in modules() if c.attack != attack]
    assert row([*modules(), *more], "foreign").reason == f"mandatory cells missing: {missing}"


def test_weights_need_not_face_what_reads_modules() -> None:
    weights = [cell(protection=0.2), cell(attack="layer-refit", protection=0.2)]
    found = {r.defense: r for r in rank([*weights, *modules()], cards).rows}
    assert {name: one.place for name, one in found.items()} == {"params": "1", "foreign": "1"}
    assert "changes-modules" in found["foreign"].flags
    assert found["params"].flags == []
    judged = [c.model_copy(update={"attack": "auto(tier=unlabeled)"}) for c in modules()[-1:]]
    found = {r.defense: r for r in rank([*weights, *modules(), *judged], cards).rows}
    assert found["params"].standing == "ranked", found["params"].reason
    # But what modules answered of the rest, weights must answer too.
    assert row([*weights[:1], *modules()]).reason == "1 of 2 cells are missing"


def test_a_release_that_does_worse_on_what_attackers_get_is_two_faced() -> None:
    """A forward that answers as the base on training inputs: nothing is left to distil."""
    found = row(modules(protection=1.0, seen=0.5), "foreign")
    assert (found.standing, found.rank) == ("two-faced", None)
    assert found.reason == (
        "two-faced: does over 5 points worse on what attackers get than on the test split (r8)"
    )
    assert "two-faced" in found.flags
    assert verdict(found).startswith("two-faced: ")
    for seen, standing in ((0.89, "ranked"), (0.889, "two-faced"), (1.0, "ranked")):
        assert row(modules(seen=seen), "foreign").standing == standing
    assert row(modules(seen=0.1, changes_modules=False), "foreign").standing == "ranked"


def test_a_release_that_hides_what_attackers_see_has_no_rank() -> None:
    found = row(modules(seen=None), "foreign")
    assert found.reason == "the release's accuracy on what attackers get was not measured"


def test_a_method_that_left_weights_out_says_so() -> None:
    noted = cell(notes={"params.partly-covered": ["conv1.weight"]})
    assert of_cell(noted, cards("params"), growth=1.0) == ["partly-covered"]
    assert "partly-covered" in row([noted]).flags


def test_flags_come_from_figures_whatever_is_stated() -> None:
    assert of_cell(cell(logit_gap=None), cards("params"), growth=1.0) == ["not-equivalent"]
    assert of_cell(cell(), cards("params"), growth=float("nan")) == []
    assert of_cell(cell(), cards("params"), growth=11) == ["norm-blow-up"]
    assert of_cell(cell(status="error"), cards("params"), growth=11) == []
    assert of_cell(cell(bf16_gap=0.3, bf16_gap_expert=0.1), cards("trap"), growth=1.0) == [
        "half-precision-loss"
    ]
