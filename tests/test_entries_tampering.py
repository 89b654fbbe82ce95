"""Every kind of tampering is found out by what tests/tampering.py says, and honest noise is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forging import Data, flipped, settle
from hypothesis import given
from hypothesis import strategies as st
from small_entries import CARD, made, wide
from tampering import CELLS, TABLE, TRULY, Tampering, table

from benchmark.core.records import Cell
from benchmark.evaluation.scoring import Gains
from benchmark.evaluation.statistics import unpack_bits
from benchmark.pipeline import suite as suites
from leaderboard import checks, folder, noise
from leaderboard.differences import Pair, differences, together
from leaderboard.entry import Entry
from leaderboard.rerun import choose
from leaderboard.strict import Malformed
from leaderboard.verify import Verdict, judge, verify

DOCS = Path(__file__).parent.parent / "docs" / "leaderboard.md"


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of the entry ships."""
    monkeypatch.setattr(suites, "builtin", lambda: ["tiny"])
    monkeypatch.setattr(suites, "load", lambda name: wide())


@pytest.fixture(scope="module")
def usual() -> Data:
    """An honest entry's JSON."""
    return made(wide()).model_dump(mode="json")


@pytest.fixture(scope="module")
def rival() -> Entry:
    """Another honest entry of the suite."""
    return made(wide("params"), 0.3)


def copy(data: Data) -> Data:
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def honest(row: Tampering, usual: Data) -> Data:
    """The entry before it is forged."""
    strength, truth = TRULY.get(row.what, (0.8, None))
    data = copy(usual) if strength == 0.8 else made(wide(), strength).model_dump(mode="json")
    if truth:
        truth(data)
    return data


def forged(row: Tampering, usual: Data) -> Data:
    """The entry as it is handed in; its flags follow from its cells, as a forger would see to."""
    data = honest(row, usual)
    row.change(data)
    if row.by in ("others", "rerun", "nothing"):
        entry = Entry.model_validate(data)
        data["flags"] = checks.flags(entry.cells, entry.defense.spec, lambda spec: CARD)
    return data


def placed(data: Data, home: Path, *others: Entry) -> tuple[Entry, Path]:
    """The entry at its place in a folder, beside others."""
    for other in others:
        folder.write(home, other)
    entry = folder.parse(json.dumps(data).encode(), "entry")
    path = folder.path_of(home, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return entry, path


def rows(*by: str) -> Any:
    return pytest.mark.parametrize("row", [r for r in TABLE if r.by in by], ids=lambda r: r.what)


def test_an_honest_entry_is_sound(usual: Data, rival: Entry, tmp_path: Path) -> None:
    entry, path = placed(usual, tmp_path, rival)
    verdict = verify(entry, path=path)
    assert (verdict.state, verdict.reasons, verdict.unchecked) == ("sound", [], [])


@rows("read")
def test_what_cannot_be_read(row: Tampering, usual: Data) -> None:
    data = json.dumps(forged(row, usual)).encode()
    with pytest.raises(Malformed, match=row.says):
        folder.parse(data, "entry")


@rows("cells")
def test_what_the_entry_itself_gives_away(row: Tampering, usual: Data, tmp_path: Path) -> None:
    entry, path = placed(forged(row, usual), tmp_path)
    verdict = verify(entry, path=path)
    assert verdict.state == "unsound"
    assert row.says in "\n".join(verdict.reasons), verdict.reasons


@rows("code")
def test_what_the_defense_here_gives_away(row: Tampering, usual: Data, tmp_path: Path) -> None:
    entry, path = placed(forged(row, usual), tmp_path)
    verdict = verify(entry, path=path)
    assert verdict.state != "sound"
    said = "\n".join([*verdict.reasons, *verdict.unchecked])
    assert row.says in said, said


@rows("others")
def test_what_another_entry_gives_away(
    row: Tampering, usual: Data, rival: Entry, tmp_path: Path
) -> None:
    alone, path = placed(forged(row, usual), tmp_path / "alone")
    verdict = verify(alone, path=path)
    assert verdict.sound  # no other means would have found it
    assert any("nothing to compare with" in note for note in verdict.notes)
    entry, path = placed(forged(row, usual), tmp_path / "beside", rival)
    verdict = verify(entry, path=path)
    assert verdict.state == "not-checked"
    assert any("contradicts params tiny-1" in one and row.says in one for one in verdict.unchecked)
    # The honest one is told as well: which of the two is wrong, only a re-run says.
    other = folder.path_of(tmp_path / "beside", rival)
    assert verify(rival, path=other).state == "not-checked"


def pairs(row: Tampering, usual: Data) -> tuple[Entry, list[Pair]]:
    """The forged entry, and its cells with what an honest machine makes of them."""
    entry = Entry.model_validate(forged(row, usual))
    truth = Entry.model_validate(honest(row, usual))
    return entry, list(zip(entry.all_cells, truth.all_cells, strict=True))


@rows("rerun")
def test_what_a_rerun_gives_away(row: Tampering, usual: Data) -> None:
    entry, found = pairs(row, usual)
    assert verify(entry).sound  # no other means would have found it
    assert len(found) == row.of
    wrong = [[p for p in differences(*pair) if row.says in p] for pair in found]
    if row.needs == 1:
        assert sum(map(bool, wrong)) == row.cells
    else:
        assert not any(wrong)
        changed = [pair for pair in found if pair[0] != pair[1]]
        assert len(changed) == row.cells
        assert not any(row.says in p for p in together(changed[: row.needs - 1]))
        assert any(row.says in p for p in together(changed[: row.needs]))
    verdict = Verdict("forged")
    judge(found, [], verdict)
    assert row.says in "\n".join(verdict.reasons)


@rows("nothing")
def test_what_nobody_finds_is_said_not_to_be_checked(row: Tampering, usual: Data) -> None:
    entry, found = pairs(row, usual)
    verdict = verify(entry)
    judge(found, [], verdict)
    assert verdict.sound
    assert any("not checked" in note and row.says in note for note in verdict.notes)


def test_the_chances_are_those_of_drawing(usual: Data) -> None:
    """Counted over many draws, for a forgery that shows in three cells."""
    (row,) = (r for r in TABLE if r.what == "nothing gained by the strongest attack")
    entry, _ = pairs(row, usual)
    drawn = [choose(entry, 3, seed) for seed in range(4000)]
    caught = np.mean([any(cell.attack == "auto" for cell in cells) for cells in drawn])
    assert caught == pytest.approx(row.chance, abs=0.025)
    assert row.chance == pytest.approx(0.343, abs=0.001)
    assert len(choose(entry, "all", 0)) == CELLS
    assert {id(cell) for cells in drawn for cell in cells} == {id(cell) for cell in entry.cells}


def test_the_table_stands_in_the_docs() -> None:
    assert len(TABLE) >= 40
    assert table() in DOCS.read_text(encoding="utf-8"), "python tests/tampering.py prints it"


# Several entries, and who is right


def test_two_forged_alike_do_not_outvote_an_honest_one(
    usual: Data, rival: Entry, tmp_path: Path
) -> None:
    (row,) = (r for r in TABLE if r.what == "no benefit in all hard cells")
    entry, path = placed(forged(row, usual), tmp_path, rival)
    alike = made(wide("arf")).model_dump(mode="json")
    row.change(alike)
    alike["flags"] = list(entry.flags)
    folder.write(tmp_path, Entry.model_validate(alike))
    liar = verify(entry, path=path)
    assert [one.split(":")[0] for one in liar.unchecked] == ["contradicts params tiny-1"]
    truth = verify(rival, path=folder.path_of(tmp_path, rival))
    assert sorted(one.split(":")[0] for one in truth.unchecked) == [
        "contradicts arf tiny-1",
        "contradicts mergelock tiny-1",
    ]


def test_a_rerun_decides_between_two(usual: Data, rival: Entry, tmp_path: Path) -> None:
    """Also where the forged entry was there first."""
    from leaderboard import shared

    (row,) = (r for r in TABLE if r.what == "undefended set to outside in one cell")
    entry, found = pairs(row, usual)
    open_ = shared.disputes(rival, [entry])
    where = {place for dispute in open_ for place in dispute.places}
    (place,) = where
    # Whatever else is drawn, the cell that they disagree about is run again.
    assert all(checks.place(choose(rival, 1, seed, where)[0]) == place for seed in range(20))
    mine = [pair for pair in zip(rival.cells, rival.cells, strict=True)
            if checks.place(pair[0]) == place]  # fmt: skip
    verdict = Verdict("params tiny-1")
    judge(mine, open_, verdict)
    assert verdict.sound
    assert any("it is mergelock tiny-1 that is wrong" in note for note in verdict.notes)
    other = Verdict("mergelock tiny-1")
    judge([pair for pair in found if checks.place(pair[0]) == place],
          shared.disputes(entry, [rival]), other)  # fmt: skip
    assert other.state == "unsound"


# Honest machines


def other_machine(cells: list[Cell], rng: np.random.Generator, flips: int) -> list[Cell]:
    """The cells as another machine makes them: ``flips`` outcomes fall to the other side, wherever
    the model they are of stands."""
    vectors = sorted({
        (task, text) for cell in cells for outcomes in cell.correct.values()
        for task, text in outcomes.items()
    })  # fmt: skip
    changed: dict[tuple[str, str], str] = {}
    for index in rng.integers(0, len(vectors), flips):
        task, text = vectors[index]
        now = changed.get((task, text), text)
        up = int(rng.random() < 0.5)
        changed[task, text] = flipped(now, up, 1 - up, int(rng.integers(2**32)))
    return [
        cell.model_copy(update={"correct": {
            who: {task: changed.get((task, text), text) for task, text in outcomes.items()}
            for who, outcomes in cell.correct.items()
        }})
        for cell in cells
    ]  # fmt: skip


@pytest.mark.slow
def test_honest_machines_agree(usual: Data) -> None:
    """10 flips of 57,600 outcomes, as seen between machines, and each wherever its model stands:
    3,000 re-runs of three cells without one alarm bound the rate by 1 in 1,000 (95 %)."""
    entry = Entry.model_validate(usual)
    rng = np.random.default_rng(0)
    alarms = 0
    for seed in range(3000):
        stated = choose(entry, 3, seed)
        found = other_machine(stated, rng, 10 * 3 // CELLS + 1)
        both = list(zip(stated, found, strict=True))
        alarms += any(p for pair in both for p in differences(*pair)) or any(together(both))
    assert alarms == 0


@pytest.mark.slow
def test_honest_machines_agree_on_every_cell(usual: Data) -> None:
    entry = Entry.model_validate(usual)
    rng = np.random.default_rng(1)
    for _ in range(150):
        found = other_machine(list(entry.cells), rng, 10)
        both = list(zip(entry.cells, found, strict=True))
        assert not [p for pair in both for p in differences(*pair)] + list(together(both))


@pytest.mark.slow
def test_what_a_forger_can_still_gain(usual: Data) -> None:
    """Whoever stays within all bounds moves no protection by more than is printed beside it."""
    entry = Entry.model_validate(usual)
    rng = np.random.default_rng(2)
    tried = 0
    for _ in range(300):
        cell = entry.cells[int(rng.integers(CELLS))]
        data = cell.model_dump(mode="json")
        for group in ("attacked", "undefended", "outside", "reference", "expert"):
            data["correct"][group] = {
                task: flipped(text, *map(int, rng.integers(0, 4, 2)), int(rng.integers(2**32)))
                for task, text in data["correct"][group].items()
            }
        settle(data)
        stated = Cell.model_validate(data)
        if list(differences(stated, cell)):
            continue
        tried += 1
        verdict = Verdict("x")
        judge([(stated, cell)], [], verdict)
        assert stated.protection is not None
        assert abs(stated.protection - (cell.protection or 0)) <= verdict.rerun[0]["may_differ"]
    assert tried > 50


@given(st.data())
def test_the_bound_of_protection_holds_for_its_gains(data: st.DataObject) -> None:
    """Whatever three gains do within what the outcomes of a cell may lean."""
    unit = st.floats(-1, 1)
    outside = data.draw(st.floats(0.3, 0.7))
    undefended = outside + data.draw(st.floats(0.05, 0.4))
    attacked = outside + data.draw(st.floats(-0.1, 1.1)) * (undefended - outside)
    most = noise.lean(600) / 600 / 0.9
    moved = [gain + most * data.draw(unit) for gain in (attacked, undefended, outside)]
    gains = Gains(attacked, undefended, outside, 1.0)
    other = Gains(*moved, 1.0)
    before, after = (1 - left / benefit for left, benefit in (gains.terms(), other.terms()))
    assert abs(after - before) <= noise.protection(gains, [0.95, 0.9], 300) + 1e-12


def test_bounds_follow_from_numbers() -> None:
    assert [noise.flips(n) for n in (20, 100, 300, 500, 1000)] == [3, 3, 6, 10, 20]
    assert [noise.lean(n) for n in (20, 600, 1000, 14400)] == [3, 3, 5, 72]
    # Seventeen examples, all to one side, may be chance once in 65,536 times; eighteen are none.
    for count, chance in ((17, 2**-16), (18, 2**-17)):
        leaning = noise.Leaning()
        text = flipped("ff" * 5000 + "80", down=20000)
        leaning.add("task", flipped(text, up=count), text)
        assert leaning.chance == chance
        assert bool(leaning.problem) == (chance < noise.ALARM)
    # A pair that stands in many cells counts once, an example that flips in many models too.
    leaning = noise.Leaning()
    for _ in range(5):
        leaning.add("task", flipped(text, up=9), text)
    assert (leaning.net, leaning.bits) == (9, len(unpack_bits(text)))
