"""From cells to ranks, tables, plots and the page. All cells here are made up."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from fabricated import ATTACKS, NO_BENEFIT, RUN, cards, cell, modules, suite
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmark import reporting
from benchmark.core.records import Cell
from benchmark.reporting import columns, html, plots, tables
from benchmark.reporting.board import Leaderboard, Robust, Row
from benchmark.reporting.ranking import give_ranks, rank
from benchmark.reporting.summary import fixed_lines, task_lines, verdict

EVIL = "<script>alert('x')</script>$a_b$"


def row(board: Leaderboard, defense: str) -> Row:
    return next(row for row in board.rows if row.defense == defense)


def grid(
    defense: str, *values: float, attacks: tuple[str, ...] = ATTACKS, **more: object
) -> list[Cell]:
    """One cell per attack, with these protections in the order of ATTACKS."""
    return [
        cell(defense, attack, protection=value, **more)  # type: ignore[arg-type]
        for attack, value in zip(attacks, values, strict=False)
    ]


def printed(cells: list[Cell], width: int) -> str:
    out = StringIO()
    tables.show(cells, rank(cells, cards), Console(file=out, width=width))
    return out.getvalue()


# -- ranking ------------------------------------------------------------------------------------


def test_robust_protection_is_the_least_of_its_tier_and_below() -> None:
    board = rank(grid("params", 1.0, 0.8, 0.9, 0.6, 0.7, 0.9, 0.3), cards)
    found = row(board, "params")
    assert (found.robust["weights"].attack, found.robust["labeled"].attack) == (
        "aga",
        "finetune-recovery",
    )
    assert "unlabeled" not in found.robust  # nobody used such access
    assert found.robust["weights"].protection == pytest.approx(0.6, abs=0.02)
    assert found.robust["labeled"].protection == pytest.approx(0.3, abs=0.02)
    assert found.unattacked is not None
    assert found.unattacked.protection == pytest.approx(1.0, abs=0.02)
    assert found.robust["weights"].interval == pytest.approx(found.robust["weights"].bounds)
    with_inputs = rank(
        [*grid("params", 1.0, 0.8), cell("params", "layer-refit", protection=0.9)], cards
    )
    found = row(with_inputs, "params")
    assert found.robust["unlabeled"] == found.robust["weights"]
    assert "labeled" not in found.robust
    assert with_inputs.tiers() == ["weights", "unlabeled"]


def test_the_lower_end_is_the_least_of_any_attack_and_merger() -> None:
    """The second merger leaves more, but is known less well."""
    sure = cell("params", merger="ties", protection=0.5, n=500)
    vague = cell("params", merger="average", protection=0.6, n=20)
    found = row(rank([sure, vague], cards), "params").robust["weights"]
    lows = [one.protection_ci[0] for one in (sure, vague) if one.protection_ci]
    assert found.merger == "ties"
    assert found.low == pytest.approx(min(lows)) == pytest.approx(lows[1])
    assert found.interval is not None
    assert found.interval[0] > found.low
    assert found.bounds == pytest.approx((max(0, found.low), found.interval[1]))


def test_the_worst_merger_counts_and_task_aware_ones_stand_apart() -> None:
    cells = [
        cell("params", merger="ties", protection=0.4),
        cell("params", merger="average", protection=0.8),
        cell("params", merger="emr", protection=0.1, task_id=True),
    ]
    found = row(rank(cells, cards), "params")
    assert found.robust["weights"].merger == "ties"
    assert found.robust_task_aware["weights"].merger == "emr"


def test_break_cost_is_access_then_examples_then_seconds() -> None:
    cells = [
        cell("params", "aga", protection=0.49, seconds={"recover": 9.0}),
        cell("params", "gauge-align", protection=0.1, seconds={"recover": 20.0}),
        cell("params", "finetune-recovery", protection=0.0, seconds={"recover": 0.1}),
        cell("params", "head-norm", protection=0.6, seconds={"recover": 0.0}),
    ]
    found = row(rank(cells, cards), "params").broken_by
    assert found is not None
    assert (found.attack, found.access, found.examples, found.seconds) == ("aga", "weights", 0, 9.0)
    labeled = row(rank(cells[2:], cards), "params").broken_by
    assert labeled is not None
    assert (labeled.attack, labeled.examples) == ("finetune-recovery", 128)
    assert row(rank(cells[3:], cards), "params").broken_by is None


def test_where_no_attack_is_needed_a_faster_one_does_not_stand_for_it() -> None:
    cells = [
        cell("params", "none", protection=0.4, seconds={"recover": 0.002}),
        cell("params", "nominal-pin", protection=0.3, seconds={"recover": 0.001}),
    ]
    found = row(rank(cells, cards), "params").broken_by
    assert found is not None
    assert found.attack == "none"


def twin(cells: list[Cell], defense: str) -> list[Cell]:
    """The same outcomes under another name."""
    return [one.model_copy(update={"defense": defense}) for one in cells]


def test_ranks_and_ties() -> None:
    two = grid("two", 0.5)
    cells = [
        *grid("one", 0.95),
        *two,
        *twin(two, "three"),
        *grid("four", 0.0),
        *grid("none", 0.0),
        *grid("oracle", 1.0),
    ]
    board = rank(cells, cards)
    places = [(r.defense, r.place) for r in board.rows]
    assert places == [
        ("one", "1"), ("three", "2="), ("two", "2="), ("four", "4"), ("oracle", "–"), ("none", "–"),
    ]  # fmt: skip
    assert [r.standing for r in board.rows[-2:]] == ["control", "reference"]


@pytest.mark.parametrize("attack", ["finetune-recovery", "layer-refit"])
def test_a_tie_at_the_weights_tier_is_decided_at_the_higher_ones(attack: str) -> None:
    one = grid("one", 0.8)
    cells = [
        *one,
        *twin(one, "two"),
        cell("one", attack, protection=0.1),
        cell("two", attack, protection=0.7),
    ]
    assert [(r.defense, r.place) for r in rank(cells, cards).rows] == [("two", "1"), ("one", "2")]


def test_a_wide_interval_never_helps() -> None:
    """0.00 with [0, 1] used to tie with 1.00 [1, 1]: their intervals overlap."""
    board = rank(
        [*grid("vague", 0.6, n=20), *grid("sure", 0.95, n=500), *grid("known", 0.5, n=500)], cards
    )
    assert [(r.defense, r.place) for r in board.rows] == [
        ("sure", "1"), ("known", "2"), ("vague", "3"),
    ]  # fmt: skip
    assert row(board, "vague").robust["weights"].bounds[1] > 0.8


def test_no_interval_counts_as_nothing() -> None:
    """With so few examples many resamples have no benefit to divide by."""
    unknown = cell("unknown", "aga", protection=1.0, n=8)
    assert unknown.protection_ci is None
    board = rank([unknown, cell("known", "aga", protection=0.3)], cards)
    assert [(r.defense, r.place) for r in board.rows] == [("known", "1"), ("unknown", "2")]
    found = row(board, "unknown").robust["weights"]
    assert (found.low, found.protection) == (0.0, pytest.approx(1.0))


ends = st.floats(-1, 2).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(ends, ends), min_size=2, max_size=6), st.floats(0, 1))
@settings(deadline=None)
def test_a_lower_end_further_down_never_ranks_higher(
    low: list[tuple[float, float]], less: float
) -> None:
    def ranked(first: tuple[float, float]) -> list[int]:
        rows = [made(*pair) for pair in (first, *low[1:])]
        give_ranks(rows)
        return [one.rank or 0 for one in rows]

    def made(weights: float, labeled: float) -> Row:
        fields = {"testbed": "b", "merger": "m", "defense": "d", "attack": "a", "access": "weights"}
        robust = {
            tier: Robust(**fields, protection=2.0, low=value)  # type: ignore[arg-type]
            for tier, value in (("weights", weights), ("labeled", labeled))
        }
        return Row(defense="d", robust=robust)  # type: ignore[arg-type]

    before = ranked(low[0])
    assert ranked((low[0][0] - less, low[0][1]))[0] >= before[0]
    assert ranked((low[0][0], low[0][1] - less))[0] >= before[0]


def test_protection_beyond_the_scale_ties_with_its_end() -> None:
    board = rank([*grid("one", 2.2), *grid("two", 1.9)], cards)
    assert {r.place for r in board.rows} == {"1="}
    assert all(r.robust["weights"].shown <= 1 for r in board.rows)
    assert all(r.robust["weights"].low > 1 for r in board.rows)


def test_an_error_in_one_cell_costs_the_rank() -> None:
    cells = [*grid("one", 1.0, 1.0), *grid("two", 0.3, 0.3)]
    cells[1] = cell("one", "weight-matching", status="error", reason="MethodError: no way",
                    protection=1.0)  # fmt: skip
    board = rank(cells, cards)
    assert [(r.defense, r.place, r.standing) for r in board.rows] == [
        ("two", "1", "ranked"),
        ("one", "–", "unranked"),
    ]
    assert row(board, "one").reason == "error in weight-matching × task-arithmetic on minilm"
    entry = next(e for e in board.matrix if e.status == "error")
    assert (entry.protection, entry.reasons) == (None, ["MethodError: no way"])


def test_one_error_among_seeds_makes_the_whole_entry_an_error() -> None:
    cells = [cell("one", seed=0, protection=1.0), cell("one", seed=1, status="error", reason="x")]
    assert [e.status for e in rank(cells, cards).matrix] == ["error"]


def test_missing_cells_cost_the_rank_but_skipped_ones_do_not() -> None:
    full = grid("one", 0.5, 0.5, 0.5)
    board = rank([*full, *grid("two", 1.0, 1.0)], cards)
    assert row(board, "two").standing == "unranked"
    assert row(board, "two").reason == "1 of 3 cells are missing"
    skipped = cell("two", "head-norm", status="skipped", reason="two models only")
    board = rank([*full, *grid("two", 1.0, 1.0), skipped], cards)
    assert row(board, "two").place == "1"


def test_no_benefit_anywhere_means_no_rank() -> None:
    board = rank([cell("params", **NO_BENEFIT, reason="nothing to protect")], cards)
    found = row(board, "params")
    assert found.standing == "unranked"
    assert "no-benefit" in found.flags
    assert verdict(found) == "no cell in which merging had a benefit; nothing was measured"


def test_as_published_is_unattacked_with_one_coefficient_for_all() -> None:
    cells = [
        cell("params", merger="task-arithmetic", protection=0.1),
        cell("params", merger="average", protection=0.9, one_coefficient=True),
        cell("params", "aga", merger="average", protection=0.2, one_coefficient=True),
        cell("params", merger="slerp(fixed=0.5)", protection=0.3, one_coefficient=True),
    ]
    found = row(rank(cells, cards), "params")
    assert found.as_published is not None
    assert found.as_published.merger == "average"
    assert found.as_published.protection == pytest.approx(0.9, abs=0.02)
    assert found.unattacked is not None
    assert found.unattacked.protection == pytest.approx(0.1, abs=0.02)
    assert row(rank(cells[:1], cards), "params").as_published is None
    text = printed(cells, 80)
    assert "as pub-" in text
    assert "as pub-" not in printed(cells[:1], 80)


def test_flags_from_cells() -> None:
    assert "not-equivalent" in row(rank(grid("params", 1.0, gap=2e-4), cards), "params").flags
    assert not row(rank(grid("trap", 1.0, gap=0.3), cards), "trap").flags
    seeds = [cell("params", seed=s, protection=v) for s, v in enumerate((0.9, 0.6))]
    assert "seed-dependent" in row(rank(seeds, cards), "params").flags
    own = [cell("params", flags=["norm-blow-up"])]
    assert "norm-blow-up" in row(rank(own, cards), "params").flags


def test_flags_of_attacks() -> None:
    harm = [cell("none", "aga", standalone=0.90), cell("none", "head-norm", standalone=0.935)]
    assert rank(harm, cards).attack_flags == {"aga": ["destructive-attack"]}
    worse = [cell("params", "aga", protection=0.2),
             cell("params", "finetune-recovery", protection=0.3)]  # fmt: skip
    assert rank(worse, cards).attack_flags == {"finetune-recovery": ["weak-attack-beats-strong"]}
    assert rank(list(reversed(harm + worse)), cards).attack_flags.keys() == {
        "aga",
        "finetune-recovery",
    }


def test_a_defense_whose_file_is_gone_is_still_reported() -> None:
    board = rank([cell("gone_file.py:Mine", protection=0.5)])
    assert [(r.defense, r.place) for r in board.rows] == [("gone_file.py:Mine", "1")]


def test_a_file_that_a_run_names_is_not_executed(tmp_path: Path) -> None:
    file, trace = tmp_path / "mine.py", tmp_path / "trace"
    file.write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    (row,) = rank([cell(f"{file}:Mine", protection=0.5)]).rows
    assert row.role == "method"
    assert not trace.exists()


def test_the_leaderboard_survives_json() -> None:
    board = rank(suite(), cards)
    assert Leaderboard.model_validate_json(board.model_dump_json()) == board


def test_the_order_of_cells_does_not_matter() -> None:
    cells = suite(("ties",))
    one, two = rank(cells, cards), rank(cells[::-1], cards)
    assert [(r.defense, r.place) for r in one.rows] == [(r.defense, r.place) for r in two.rows]


# -- console ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_console_fits_and_tells_the_story(width: int) -> None:
    text = printed(suite(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "Merged by ties  minilm, victim r8 with bbc, seed 0" in text
    # One row per defense under all seven attacks, with a mark and an interval below.
    line = next(line for line in text.splitlines() if re.match(r"params +0\.99 ✓", line))
    assert re.findall(r"\d\.\d\d [✓~✗]", line) == [
        "0.99 ✓", "0.80 ~", "0.85 ~", "0.40 ✗", "0.02 ✗", "0.90 ~", "0.70 ~",
    ]  # fmt: skip
    assert "error in mergelock, aga, ties: MethodError: NaN in recovered weights" in text
    assert "params: broken by gauge-align (weights only, no data, 0.2 s)" in text
    assert re.search(r"r8 \(victim\) +44\.0 +94\.0 +92\.0 92\.0", text)
    assert "…" not in text


def test_statuses_are_words() -> None:
    cells = [
        *grid("params", 1.0),
        cell("params", "aga", **NO_BENEFIT),
        cell("params", "head-norm", status="skipped", reason="x"),
        cell("params", "gauge-align", status="error", reason="y"),
    ]
    text = printed(cells, 80)
    for word in ("no-\n", "benefit", "skipped", "error"):
        assert re.sub(r" +\n", "\n", word) in re.sub(r" +", "\n", text)


def test_many_attacks_continue_in_a_second_block() -> None:
    names = tuple(f"attack-number-{i}" for i in range(14))
    text = printed(grid("params", *[0.5] * 14, attacks=names), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert len(re.findall(r"attack →", text)) == 2
    matrix = text[: text.index("Ranking")]
    assert len(re.findall(r"0\.\d\d [~✗]", matrix)) == 14


def test_other_modules_are_ranked_in_a_table_of_their_own() -> None:
    cells = [*grid("params", 0.3), cell("params", "layer-refit"), *modules(), *grid("none", 0.0)]
    board = rank(cells, cards)
    assert [(r.defense, r.track, r.place) for r in board.rows] == [
        ("params", "weights", "1"), ("none", "weights", "–"), ("foreign", "modules", "1"),
    ]  # fmt: skip
    text = printed(cells, 80)
    ranking = text[text.index("Ranking by") :]
    assert ranking.index("params  ") < ranking.index("run other modules") < ranking.index("foreign")
    assert max(map(len, text.splitlines())) <= 80


def test_names_are_no_markup() -> None:
    assert "[bold]x[/bold]" in printed(grid("[bold]x[/bold]", 1.0), 100)


def test_nothing_yet() -> None:
    assert "no cells yet" in printed([], 80)


# -- summary ------------------------------------------------------------------------------------


def test_what_there_was_to_gain() -> None:
    victim, partner = task_lines(suite())
    assert (victim.task, victim.victim) == ("r8", True)
    assert (victim.zero_shot, victim.expert) == pytest.approx((0.44, 0.94))
    assert victim.merged == pytest.approx({"task-arithmetic": 0.92, "ties": 0.92})
    assert (partner.label, partner.victim) == ("bbc", False)


def test_fixed_coefficients_are_of_the_victim_and_unattacked() -> None:
    (line,) = fixed_lines(grid("params", 1.0, 0.5), ["params"])
    assert line.accuracy == {"0.3": 0.5, "0.8": 0.7}
    assert (line.expert, line.zero_shot) == (0.94, 0.44)


# -- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    reporting.write(folder, suite(), RUN, cards)
    return folder


class Page(HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_folder_gets_its_reports(written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == ["leaderboard.json", "plots", "report.html"]
    assert sorted(p.name for p in (written / "plots").iterdir()) == [
        "fixed-minilm-task-arithmetic.png", "fixed-minilm-ties.png",
        "heatmap-minilm-task-arithmetic.png", "heatmap-minilm-ties.png", "utility.png",
    ]  # fmt: skip
    board = Leaderboard.model_validate_json((written / "leaderboard.json").read_text())
    assert board == rank(suite(), cards)
    for path in (written / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_is_whole_and_fetches_nothing(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "a"}
    sources = [str(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for words in ("What was asked", "Ranking", "Which defense survives which attack",
                  "Accuracy per task", "Cells without a score", "How to recompute",
                  "Environment", "What the columns mean", "MethodError: NaN in recovered weights",
                  "packages: torch", "2=", "unmergebench report"):  # fmt: skip
        assert words in page.text
    assert "prefers-color-scheme: dark" in page.text


def test_every_column_stands_where_it_says(tmp_path: Path) -> None:
    """One table of columns: console, page, data. What the site adds is tested there."""
    uses = {"int8": {"released": 0.8, "expert": 0.9}}
    cells = [
        *modules(),
        cell(attack="none", benign=uses, one_coefficient=True),
        cell(attack="layer-refit"),
        cell(attack="finetune-recovery"),
        cell(merger="emr", task_id=True),
    ]
    board = rank(cells, cards)
    reporting.write(tmp_path, cells, RUN, cards)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = columns.of_view("page", board)
    # Those of secrets and generators: tests/test_secrets.py, test_diffusion.py, test_drawing.py.
    elsewhere = {"leaks", "kept", "quality", "alignment"}
    assert {c.name for c in shown} == {c.name for c in columns.COLUMNS} - elsewhere
    for column in shown:
        assert page.count(f"<th>{column.title}</th>") == 2  # weights, modules
        assert f"<dt>{column.title}</dt><dd>" in page
    text = printed(cells, 200)
    for column in columns.of_view("console", board):
        assert column.short
        for words in column.short.split("\n"):
            assert words in text
    names = [field.name for field in columns.FIELDS]
    assert len(names) == len(set(names))
    one = row(board, "params")
    flat = {field.name: field.value(one) for field in columns.FIELDS}
    assert flat["robust_task_aware"] == pytest.approx(0, abs=0.02)
    assert (flat["tax_use"], flat["as_published_merger"]) == ("int8", "task-arithmetic")


def test_every_string_is_escaped(tmp_path: Path) -> None:
    cells = [
        cell(EVIL, EVIL, EVIL, 0.5, testbed=EVIL, choice=EVIL),
        cell(EVIL, "none", EVIL, 0.5, testbed=EVIL, flags=[EVIL]),
        cell("params", EVIL, EVIL, 0.5, testbed=EVIL, status="error", reason=EVIL),
    ]
    run = {**RUN, "suite": {"name": EVIL, "hash": EVIL, "description": EVIL, EVIL: EVIL},
           "device": EVIL, "packages": {EVIL: EVIL}, "git": {EVIL: EVIL}}  # fmt: skip
    reporting.write(tmp_path, cells, run, cards)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 15
    assert Page(text).open == []
    assert all(p.parent == tmp_path / "plots" for p in tmp_path.rglob("*.png"))


def test_names_that_fonts_and_files_cannot_hold(tmp_path: Path) -> None:
    cells = [cell("защита/水", merger=m, protection=0.5) for m in ("a/b", "a b")]
    drawn = plots.write(tmp_path, cells, rank(cells, cards))
    assert len(set(drawn.values())) == len(drawn) == 5


def test_names_as_long_as_a_path_leave_room_for_the_plot(tmp_path: Path) -> None:
    """matplotlib warns where labels take all, and draws nothing; a warning is an error here."""
    long = f"/home/{'a-long-name/' * 20}locks.py"
    cells = [
        cell(f"{long}:{lock}", attack, protection=0.5)
        for lock in ("First", "Second")
        for attack in ("none", f"{long}:Attack")
    ]
    board = rank(cells, lambda name: cards("params"))
    plots.write(tmp_path, cells, board)
    figure = plots.heatmap(board, cells[0].testbed, cells[0].merger)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {label.rpartition(":")[2] for label in labels} == {"First", "Second"}
    figure.canvas.draw()
    assert figure.axes[0].bbox.width > 0.4 * figure.bbox.width


def test_a_second_report_draws_nothing_anew(written: Path) -> None:
    files = sorted((written / "plots").iterdir())
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    files[0].write_bytes(before[files[0]][1][:-20])  # cut short: must be drawn again
    start = time.process_time()
    reporting.write(written, suite(), RUN, cards)
    assert time.process_time() - start < 2
    assert files[0].read_bytes() == before[files[0]][1]
    assert all(p.stat().st_mtime_ns == before[p][0] for p in files[1:])


def test_changed_cells_change_the_plots(tmp_path: Path) -> None:
    cells = [*grid("params", 1.0), *grid("trap", 0.5)]
    reporting.write(tmp_path, cells, RUN, cards)
    name = "plots/heatmap-minilm-task-arithmetic.png"
    before = (tmp_path / name).read_bytes()
    reporting.write(tmp_path, [c for c in cells if c.defense != "trap"], RUN, cards)
    assert (tmp_path / name).read_bytes() != before


def test_a_failed_write_leaves_the_old_report(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (written / "report.html").read_bytes()

    def fails(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "page", fails)
    with pytest.raises(OSError, match="No space"):
        reporting.write(written, suite(), RUN, cards)
    assert (written / "report.html").read_bytes() == before
    assert not [p for p in written.rglob("*") if p.name.startswith(".")]


def test_a_run_without_any_cell_or_fact(tmp_path: Path) -> None:
    board = reporting.write(tmp_path, [], {}, cards)
    assert board.rows == []
    assert "No cells yet" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_suite_in_the_page_reads_back_to_its_hash(tmp_path: Path) -> None:
    from benchmark.pipeline.suite import Suite, load

    shipped = load("quick")
    facts = {"hash": shipped.hash, **shipped.model_dump(mode="json")}
    run = {"suite": facts}
    assert html.commands(run, tmp_path)[1][1] == "unmergebench run quick --out again"
    edited = Suite.model_validate({**shipped.model_dump(), "defenses": ['my "odd" \\ file.py:X']})
    facts = {"hash": edited.hash, **edited.model_dump(mode="json")}
    assert "suite.toml" in html.commands({"suite": facts}, tmp_path)[1][1]
    (tmp_path / "suite.toml").write_text(html.suite_toml(facts), encoding="utf-8")
    assert load(str(tmp_path / "suite.toml")) == edited


def test_json_has_no_nan(written: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((written / "leaderboard.json").read_text(), parse_constant=refuse)
