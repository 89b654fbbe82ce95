"""The public page: what it holds, what it refuses, what strangers' text cannot do to it."""

from __future__ import annotations

import csv
import hashlib
import json
import socket
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from click.testing import Result
from fabricated import modules
from listed import EVIL, MERGERS, entry, hostile, several, written
from typer.testing import CliRunner

from benchmark.api.contracts import Card
from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.reporting.standing import place
from leaderboard import folder
from leaderboard.cli import app
from leaderboard.site import build, pages, serve
from leaderboard.site.collect import Listed, questions, read
from leaderboard.site.downloads import Listing
from leaderboard.site.pages import href, seen, shade, table_script
from leaderboard.site.serve import server


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("site")
    built = build(several(home / "entries"), home / "site")
    assert (built.entries, built.suites, built.defenses) == (11, 2, 8)
    return home / "site"


def test_every_link_leads_somewhere_and_ids_are_unique(site: Path) -> None:
    paths = [site / "index.html", *(site / "defenses").glob("*.html")]
    assert len(paths) == 9
    anchors = {page: {a.get("id") for _, a in Page(page).elements} for page in paths}
    for page in paths:
        found = Page(page)
        ids = [attributes["id"] for tag, attributes in found.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), page
        for link in [a["href"] or "" for a in found.all("a")]:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), link
            if parts.fragment:
                assert parts.fragment in anchors[target], link


def test_the_page_says_what_it_is_to_those_who_do_not_see_it(site: Path) -> None:
    for page in [site / "index.html", site / "defenses" / "params.html"]:
        found = Page(page)
        assert found.all("html") == [{"lang": "en"}]
        assert all(head.get("scope") in ("col", "row") for head in found.all("th"))
        assert len(found.all("caption")) == len(found.all("table")) > 0
        assert all(svg.get("aria-label") for svg in found.all("svg"))
        assert len(found.all("h1")) == len(found.all("main")) == 1
        assert any(link.get("href") == "#main" for link in found.all("a"))
    index = Page(site / "index.html")
    for head in [head for head in index.all("th") if head["scope"] == "col"]:
        assert head["title"] in index.text  # the definition stands in the list, too


def test_ranks_hold_within_a_suite_and_only_for_what_counts(site: Path) -> None:
    frame = pd.read_parquet(site / "leaderboard.parquet")
    assert set(zip(frame["suite"], frame["defense"], strict=True)) >= {
        ("quick", "trap"), ("smoke", "trap"), ("quick", "params"), ("smoke", "params"),
    }  # fmt: skip
    assert frame.groupby("question")["suite"].nunique().eq(1).all()
    assert frame.groupby("question")["rank"].min().eq(1).all()
    assert "fraud" not in set(frame["defense"])
    assert frame[frame["defense"] == "params"]["version"].tolist() == ["quick-2", "smoke-1"]
    assert pd.isna(frame.set_index("defense").loc["oracle", "rank"])
    text = Page(site / "index.html").text
    assert "invalidated: its release was not the one measured" in text
    assert "superseded by quick-2" in text


def test_ranked_by_the_lower_end_and_shown_with_it(site: Path) -> None:
    frame = pd.read_parquet(site / "leaderboard.parquet")
    for _, group in frame[frame["rank"].notna()].groupby("question"):
        lows = group.sort_values("rank")["low_weights"].clip(0, 1).round(2).tolist()
        assert lows == sorted(lows, reverse=True)
    rows = frame.set_index(["suite", "defense"])
    assert rows.loc[("smoke", "params"), "as_published"] == pytest.approx(0.99, abs=0.02)
    assert rows.loc[("smoke", "params"), "as_published_merger"] == "ties"
    items = json.loads((site / "entries.json").read_text())["entries"]
    (smoke,) = (i for i in items if (i["defense"], i["version"]) == ("params", "smoke-1"))
    assert smoke["as_published"] == rows.loc[("smoke", "params"), "as_published"]
    assert smoke["low"]["weights"] == rows.loc[("smoke", "params"), "low_weights"]
    assert "unlabeled" not in smoke["robust"]
    index = Page(site / "index.html").text
    assert "As published" in index
    assert "not run" in index  # nobody used unlabeled data


def test_releases_with_modules_have_a_track(tmp_path: Path) -> None:
    foreign = entry("trap")
    own = [one.model_copy(update={"changes_modules": True, "seen": 0.95}) for one in foreign.cells]
    cells = tuple(own + modules("trap"))
    changed = foreign.model_copy(update={"cells": tuple({place(c): c for c in cells}.values())})
    one = Listed(changed, "trap/quick-1.json", b"")
    other = Listed(entry("params"), "params/quick-1.json", b"")
    asked = questions([one, other])
    found = {row.defense: (row.track, row.place) for row, _ in asked[0].rows}
    assert found == {"trap": ("modules", "1"), "params": ("weights", "–")}  # lacks layer-refit
    page = tmp_path / "page.html"
    at = {"trap": "trap.html", "params": "params.html"}
    page.write_text(pages.index(asked, [], at), encoding="utf-8")
    tracks = [a["data-track"] for a in Page(page).all("tr") if "data-track" in a]
    assert tracks == ["weights", "modules"]
    page.write_text(pages.defense("trap", [one], asked, at), encoding="utf-8")
    assert "rank 1 among modules" in Page(page).text


def test_other_data_is_another_question(tmp_path: Path) -> None:
    one, other = entry("params"), entry("trap")
    moved = other.subjects.model_copy(update={"data": "b" * 64})
    home = written(tmp_path / "e", one, other.model_copy(update={"subjects": moved}))
    apart = questions(read(home))
    assert [len(question.listed) for question in apart] == [1, 1]
    assert len({question.label for question in apart}) == 2
    home = written(tmp_path / "f", one, other)
    (together,) = questions(read(home))
    assert [row.place for row, _ in together.rows] != ["1", "1"]
    assert together.label == "quick"


def test_a_stronger_attack_stands_beside_the_score_with_credit(site: Path) -> None:
    index, page = Page(site / "index.html"), Page(site / "defenses" / "params.html")
    assert "gauge-align+aga, by A. Rival" in index.text
    assert "Credit: A. Rival, 2030-02-01" in page.text
    rows = pd.read_csv(site / "leaderboard.csv").set_index(["defense", "suite"])
    assert rows.loc[("params", "quick"), "best_known_weights"] == pytest.approx(0, abs=0.02)
    assert pd.isna(rows.loc[("trap", "quick"), "best_known_weights"])


def test_a_defense_page_has_the_matrix_and_the_commands(site: Path) -> None:
    text = Page(site / "defenses" / "params.html").text
    assert "unmergebench verify leaderboard/entries/params/quick-2.json --rerun 3" in text
    assert "unmergebench run quick --defense params --out runs/again" in text
    name = folder.slug("params(scaling=symmetric)")
    text = Page(site / "defenses" / f"{name}.html").text
    assert "--defense 'params(scaling=symmetric)'" in text  # as a shell needs it
    assert "finetune-recovery" in text
    assert "FLOPs of the attack on data" in text


def test_downloads_agree_with_each_other_and_with_the_entries(site: Path) -> None:
    frame = pd.read_parquet(site / "leaderboard.parquet")
    rows = json.loads((site / "leaderboard.json").read_text())["rows"]
    with (site / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(frame.columns) == list(rows[0]) == list(table[0])
    for at, row in frame.iterrows():
        for column in ("robust_weights", "low_weights", "utility"):
            assert rows[at][column] == pytest.approx(row[column], abs=1e-12)
            assert float(table[at][column]) == pytest.approx(row[column], abs=1e-12)
    listing = json.loads((site / "entries.json").read_text(encoding="ascii"))
    schema = json.loads((site / "entries.schema.json").read_text())
    assert listing["schema_version"] == schema["properties"]["schema_version"]["const"] == 1
    assert len(Listing.model_validate(listing).entries) == 11
    for item in listing["entries"]:
        data = (site / item["url"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == item["sha256"]
        assert folder.parse(data, "it").version == item["version"]
        assert (site / item["page"]).is_file()
        assert (item["rank"] is None) or not (item["superseded_by"] or item["invalidated"])
    assert json.loads((site / "schema.json").read_text())["properties"]["cells"]


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("trap"))
    for name in ("one", "two"):
        build(home, tmp_path / name)
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")
         if p.is_file()}
        for n in ("one", "two")
    )  # fmt: skip
    assert len(one) == 10
    assert one == two


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    gone = entry("javascript:alert(6)", invalidated=EVIL)
    home = written(tmp_path / "e", hostile(), gone, entry("../../up"))
    site = build(home, tmp_path / "site").page.parent
    all_pages = [site / "index.html", *(site / "defenses").glob("*.html")]
    assert len(all_pages) == 4
    for path in all_pages:
        page = Page(path)
        assert len(page.all("script")) == (path.name == "index.html")
        assert page.all("img") == page.all("iframe") == []
        names = {name for _, attributes in page.elements for name in attributes}
        assert not [name for name in names if name.startswith("on")]
        for _, attributes in page.elements:
            link = attributes.get("href")
            assert link is None or urlsplit(link).scheme in ("", "https", "data")
    shown = Page(site / "index.html").text
    assert EVIL in shown
    mine = next(p for p in all_pages if "{{ 7 * 7 }}" in p.read_text(encoding="utf-8"))
    assert "javascript:alert(3)" in Page(mine).text
    assert EVIL in Page(mine).text
    assert {p.parent for p in site.rglob("*.html")} == {site, site / "defenses"}
    table = pd.read_csv(site / "leaderboard.csv")
    assert any(str(name).startswith("'=HYPERLINK") for name in table["credit"])


def test_text_that_turns_around_is_shown_as_it_is(tmp_path: Path) -> None:
    """Reading refuses such an entry already; the page does not count on it."""
    card = Card(summary="\u202egnp.exe\u2066 \x07")
    one = Listed(entry("trap", card=card, credit="A. Author"), "trap/quick-1.json", b"")
    asked = questions([one])
    page = tmp_path / "page.html"
    page.write_text(pages.defense("trap", [one], asked, {"trap": "trap.html"}), encoding="utf-8")
    assert "\ufffdgnp.exe\ufffd \ufffd" in Page(page).text
    assert not {"\u202e", "\u2066", "\x07"} & set(page.read_text(encoding="utf-8"))


def test_the_pages_policy_names_its_one_script(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    (meta,) = (m for m in Page(site / "index.html").all("meta") if "http-equiv" in m)
    policy = meta["content"] or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    script = text.split("<script>")[1].split("</script>")[0]
    assert script == table_script()
    assert "<!--" not in script
    (defense,) = (m for m in Page(site / "defenses" / "trap.html").all("meta") if "http-equiv" in m)
    assert "script-src 'none'" in (defense["content"] or "")


@pytest.mark.parametrize(
    "url",
    ["javascript:alert(1)", "data:text/html,x", "//host/x", "http:", "JaVaScRiPt://x", "file:///etc",
     "https://[", " javascript:x", ""],
)  # fmt: skip
def test_only_web_addresses_become_links(url: str) -> None:
    assert href(url) is None
    assert href("https://arxiv.org/abs/2503.07661") == "https://arxiv.org/abs/2503.07661"


def test_invisible_characters_are_shown() -> None:
    assert seen("a\u202eb\u200bc") == "a\ufffdb\ufffdc"
    assert seen("é λ ש") == "é λ ש"
    assert seen(3) == 3


def test_text_on_shades_can_be_read() -> None:
    def light(colour: str) -> float:
        full = "".join(2 * c for c in colour) if len(colour) == 3 else colour
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for step in range(101):
        ground, text = (part.split("#")[1] for part in shade(step / 100).split(";"))
        low, high = sorted((light(ground), light(text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, step


def test_out_is_never_a_folder_of_something_else(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("trap"))
    mine = tmp_path / "mine"
    mine.mkdir()
    build(home, mine)  # empty is fine
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.txt, which was not made here"):
        build(home, mine)
    assert (mine / "thesis.txt").read_text() == "mine"
    (mine / "thesis.txt").unlink()
    build(home, mine)
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(UsageError, match="which was not made here"):
        build(home, other)
    with pytest.raises(UsageError, match="is no folder"):
        build(home, other / "index.html")
    with pytest.raises(UnmergeBenchError, match="is no folder"):
        build(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "nowhere").exists()


def test_a_build_that_fails_leaves_the_site_as_it_was(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("trap"))
    build(home, tmp_path / "site")
    before = (tmp_path / "site" / "index.html").read_bytes()
    (home / "trap" / "quick-2.json").write_text("{")
    with pytest.raises(UnmergeBenchError, match=r"quick-2\.json: no JSON"):
        build(home, tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_bytes() == before
    left = {path.name for path in tmp_path.iterdir()} - {".site.lock"}
    assert left == {"e", "site"}


def test_a_removed_entry_leaves_the_site(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("trap"), entry("params"))
    build(home, tmp_path / "site")
    (home / "params" / "quick-1.json").unlink()
    build(home, tmp_path / "site")
    assert not (tmp_path / "site" / "defenses" / "params.html").exists()
    assert not (tmp_path / "site" / "entries" / "params").exists()


def test_no_entry_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    built = build(tmp_path / "e", tmp_path / "site")
    assert "No entry counts yet" in built.page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "site" / "entries.json").read_text())["entries"] == []
    assert len(pd.read_parquet(tmp_path / "site" / "leaderboard.parquet")) == 0


@pytest.mark.slow
def test_builds_while_entries_are_written_lose_nothing(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("d0", mergers=MERGERS[:1]))
    made, failed, done = [1], [], threading.Event()

    def builder() -> None:
        while not done.is_set():
            known = made[0]
            try:
                if build(home, tmp_path / "site").entries < known:
                    failed.append("an entry written before the build is not on the page")
            except Exception as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=builder) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 4):
        one = entry(f"d{number}", mergers=MERGERS[:1])
        with folder.locked(home):
            folder.write(home, one)
            made[0] += 1
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []
    build(home, tmp_path / "site")
    listing = json.loads((tmp_path / "site" / "entries.json").read_text())
    assert {item["defense"] for item in listing["entries"]} == {"d0", "d1", "d2", "d3"}


def test_the_server_is_for_this_machine_and_this_folder(site: Path, tmp_path: Path) -> None:
    with server(site, 0) as running:
        assert running.server_address[0] == "127.0.0.1"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{running.server_port}"
        with urllib.request.urlopen(f"{home}/entries.json") as answer:
            assert answer.read() == (site / "entries.json").read_bytes()
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{home}/%2e%2e/entries/trap/quick-1.json.bak")
        refused.value.close()
        with pytest.raises(UnmergeBenchError, match="--port 0 takes a free one"):
            server(site, running.server_port)
        running.shutdown()
    with pytest.raises(UsageError, match="leaderboard build --out"):
        server(tmp_path, 0)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands(tmp_path: Path) -> None:
    home = written(tmp_path / "e", entry("trap"))
    done = command("build", "--entries", home, "--out", tmp_path / "site")
    page = tmp_path / "site" / "index.html"
    assert done.stdout == f"1 entries of 1 defenses, 1 suites: {page}\n"
    refused = command("build", "--entries", home, "--out", tmp_path).exception
    assert isinstance(refused, UsageError)
    assert "which was not made here" in str(refused)
    assert isinstance(command("serve", "--site", tmp_path / "none").exception, UsageError)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = command("serve", "--site", tmp_path / "site", "--port", port).exception
    assert isinstance(failed, UnmergeBenchError)
    assert f"port {port}" in str(failed)
    for name in ("build", "serve"):
        assert f"unmergebench leaderboard {name}" in command(name, "--help").stdout


def test_serving_says_where_and_stops_quietly(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: ThreadingHTTPServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    serve(site, 0, print)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("http://127.0.0.1:")
    assert last == "stopped"
