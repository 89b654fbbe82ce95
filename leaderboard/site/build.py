"""``leaderboard build``: the folder of entries as a static site, replaced in one step."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from benchmark.core.errors import UsageError
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
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            built = _write(fresh, found)
            _replace(out, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return Built(out / "index.html", len(found), *built)


def _write(site: Path, found: list[collect.Listed]) -> tuple[int, int]:
    site.chmod(0o755)  # mkdtemp made it private; a web server must read it
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
    made = sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file())
    (site / MARKER).write_text(json.dumps([*made, MARKER], indent=1) + "\n", encoding="ascii")
    return len(questions), len(at)


def _check(out: Path) -> None:
    """Refuse to replace anything but a site, and a site to which somebody added a file."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is no folder; give --out a new one")
    held = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()
            or path.is_symlink()}  # fmt: skip
    made: set[str] = set()
    if MARKER in held:
        try:
            made = set(json.loads((out / MARKER).read_text(encoding="ascii")))
        except (ValueError, TypeError):
            made = {MARKER}
    if foreign := sorted(held - made):
        raise UsageError(f"{out} holds {foreign[0]}, which no build made; move it, or change --out")


def _replace(out: Path, fresh: Path) -> None:
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    try:
        if out.exists():
            out.rename(old / "site")
        try:
            fresh.rename(out)
        except BaseException:
            if (old / "site").exists():
                (old / "site").rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
