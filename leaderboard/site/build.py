"""``leaderboard build``: the folder of entries as a static site, replaced in one step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from benchmark.core.errors import UsageError
from benchmark.core.outputs import check_ours, replacing_folder
from leaderboard.folder import slug
from leaderboard.site import collect, downloads, pages

#: Lists what a build made, so that a later one removes nothing else.
MARKER = ".unmergebench-site"


class Built(NamedTuple):
    """Where the page is, and what is on it."""

    page: Path
    entries: int
    suites: int
    defenses: int


def build(entries: Path, out: Path) -> Built:
    """Write the site of all entries to ``out``; builds of one site wait for each other.

    The same entries give the same bytes.

    Raises:
        UsageError: ``out`` holds something that no build made.
        UnmergeBenchError: no folder of entries, or a file there is none.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock", timeout=600):
        _check(out)
        found = collect.read(entries)
        with replacing_folder(out, MARKER) as fresh:
            built = _write(fresh, found)
    return Built(out / "index.html", len(found), *built)


def _write(site: Path, found: list[collect.Listed]) -> tuple[int, int]:
    questions = collect.questions(found)
    at = {listed.spec: f"defenses/{slug(listed.spec)}.html" for listed in found}
    counted = {listed.place for question in questions for listed in question.listed}
    gone = [listed for listed in found if listed.place not in counted]
    (site / "defenses").mkdir()
    for spec, page in at.items():
        versions = [listed for listed in found if listed.spec == spec]
        text = pages.defense(spec, versions, questions, at)
        (site / page).write_text(text, encoding="utf-8")
    (site / "index.html").write_text(pages.index(questions, gone, at), encoding="utf-8")
    downloads.write(site, found, questions, at)
    return len(questions), len(at)


def _check(out: Path) -> None:
    """Refuse to replace anything but a site, and a site to which somebody added a file."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder; give --out a new one")
    if out.exists():
        check_ours(out, marker=MARKER)
