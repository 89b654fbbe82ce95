"""Execute a plan into a run folder: resumable, and each cell written as soon as it is known."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.core.paths import cache, replacing, set_aside, sweep, write_text
from benchmark.core.records import SCHEMA_VERSION, Cell
from benchmark.evaluation import soundness
from benchmark.pipeline import apart, identity
from benchmark.pipeline.plan import Plan, Planned
from benchmark.pipeline.store import Store

log = logging.getLogger(__name__)

#: What a run that was killed before it wrote anything leaves in its folder.
_OWN = re.compile(r"\.lock|\.run\.json\..{8}")

#: Hears (finished cells, all cells, newest cell or None) and what is being done now.
Progress = Callable[[int, int, Cell | None], None]


def read_cells(folder: Path) -> list[Cell]:
    """The cells of a run folder; a last line cut short by a crash is left out.

    Raises:
        UnmergeBenchError: no cells there, a line that is damaged, or a cell that stands twice.
    """
    path = folder / "cells.jsonl"
    cells: dict[str, Cell] = {}
    for number, found in enumerate(_lines(folder), start=1):
        if isinstance(found, str):
            problem = found
        elif found.key in cells:
            problem = "a cell that stands twice"
        else:
            cells[found.key] = found
            continue
        raise UnmergeBenchError(f"{path}:{number}: {problem}; delete the line and run again")
    return list(cells.values())


def judged_cells(folder: Path) -> list[Cell]:
    """The cells of a run folder, to put together.

    Raises:
        UnmergeBenchError: as :func:`read_cells`; or made by a version with other rules, whose cells
            lack what today's verdicts follow from; or a figure that does not follow from the cell's
            own outcomes.
    """
    cells = read_cells(folder)
    if any(cell.gain is not None and cell.gain_reference is None for cell in cells):
        raise UnmergeBenchError(
            f"{folder} was made by an earlier version of UnmergeBench; run it again"
        )
    for number, cell in enumerate(cells, start=1):
        if problem := next(soundness.problems(cell), None):
            raise UnmergeBenchError(
                f"{folder / 'cells.jsonl'}:{number}: {problem}; delete the line and run again"
            )
    return cells


def _lines(folder: Path) -> Iterator[Cell | str]:
    """The cell of each whole line of cells.jsonl, or what is wrong with the line."""
    path = folder / "cells.jsonl"
    if not path.is_file():
        raise UnmergeBenchError(f"{folder} holds no run (no cells.jsonl); name a run folder")
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield Cell.model_validate_json(line)
        except ValidationError as error:
            yield error.errors(include_url=False, include_input=False)[0]["msg"]


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Raises:
        UnmergeBenchError: there is none, or it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UnmergeBenchError(f"{folder} holds no run (no run.json); name a run folder")
    try:
        return _Facts.model_validate_json(path.read_bytes()).model_dump(exclude_unset=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise UnmergeBenchError(
            f"{path} is damaged ({where}{': ' if where else ''}{problem['msg']}); run again into "
            "another folder: what is in the cache is not computed again"
        ) from None


class _Facts(BaseModel):
    """What run.json may hold. Nothing is required: what needs a fact says so itself."""

    model_config = ConfigDict(extra="allow")

    suite: dict[str, Any] = {}
    testbed: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    packages: dict[str, Any] = {}
    git: dict[str, Any] = {}
    checks: dict[str, Any] | None = None
    seeds: list[int] = []
    device: str = ""
    created: str = ""
    seconds: float | None = None
    finished: bool = False


def execute(
    plan: Plan,
    folder: Path,
    device: torch.device,
    *,
    progress: Progress = lambda done, total, cell: None,
    notify: Callable[[str], None] = lambda text: None,
    facts: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Compute what is missing and return all cells, in plan order.

    ``facts``: what else run.json is to hold.

    Raises:
        UsageError: the folder holds something else, or a run of another suite.
        UnmergeBenchError: another process is writing the same run.
    """
    _claim(plan, folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            return _execute(plan, folder, device, progress, notify, facts or {})
    except Timeout:
        raise UnmergeBenchError(f"another process is writing {folder}; wait for it") from None


def _execute(
    plan: Plan,
    folder: Path,
    device: torch.device,
    progress: Progress,
    notify: Callable[[str], None],
    facts: Mapping[str, Any],
) -> list[Cell]:
    path = folder / "cells.jsonl"
    for written in (path, folder / "run.json"):
        sweep(written)
    wanted = {planned.key for planned in plan.cells}
    before = _believed(folder) if path.exists() else []
    # Errors are tried again: they may have been the machine's.
    known = {cell.key: cell for cell in before if cell.key in wanted and cell.status != "error"}
    if len(known) == len(wanted) and [c.key for c in before] == [p.key for p in plan.cells]:
        return before
    start = time.perf_counter()
    _write_run(plan, folder, device, None, facts)
    _write_cells(path, list(known.values()))
    store = Store(cache() / "store")
    try:
        maker = None
        for done, planned in enumerate(plan.cells):
            progress(done, len(plan.cells), None)
            if planned.key in known:
                continue
            if maker is None:
                maker = _maker(plan, device, store, notify)
            known[planned.key] = cell = _cell(planned, store, maker)
            with path.open("a", encoding="utf-8") as file:
                file.write(cell.model_dump_json() + "\n")
            progress(done + 1, len(plan.cells), cell)
    finally:
        apart.close()
        store.close()
    cells = [known[planned.key] for planned in plan.cells]
    _write_cells(path, cells)
    _write_run(plan, folder, device, time.perf_counter() - start, facts)
    return cells


def _believed(folder: Path) -> list[Cell]:
    """The cells of a run folder to go on from. If a line is damaged or says what does not follow
    from its outcomes, the file is kept under another name, and the cell made again."""
    found = list(_lines(folder))
    cells = [cell for cell in found if isinstance(cell, Cell) and not any(soundness.problems(cell))]
    if lost := len(found) - len(cells):
        path = folder / "cells.jsonl"
        log.warning(
            "%s: %d of %d lines are damaged or were edited: kept as %s, their cells made again",
            path, lost, len(found), set_aside(path).name,
        )  # fmt: skip
    return cells


def _maker(plan: Plan, device: torch.device, store: Store, notify: Callable[[str], None]) -> Any:
    from benchmark.pipeline.cells import CellMaker
    from benchmark.pipeline.workbench import Workbench

    return CellMaker(Workbench(plan.testbed, device, store, notify), plan.suite)


def _cell(planned: Planned, store: Store, maker: Any) -> Cell:
    stored = store.get(f"cell:{planned.key}")
    if stored is not None:
        return Cell.model_validate(stored)
    cell: Cell = maker.compute(planned.key, planned.at)
    if cell.status != "error":
        store.put(f"cell:{planned.key}", cell.model_dump(mode="json"))
    return cell


def _claim(plan: Plan, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder with --out")
    if (folder / "run.json").exists():
        found = read_run(folder).get("suite", {})
        if found.get("hash") != plan.suite.hash:
            raise UsageError(
                f"{folder} holds a run of another suite ({found.get('name')!r}, or an older "
                f"version of it); choose another folder with --out"
            )
    elif folder.exists() and any(not _OWN.fullmatch(f.name) for f in folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and holds no run; choose another folder with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _write_cells(path: Path, cells: Sequence[Cell]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(c.model_dump_json() + "\n" for c in cells), encoding="utf-8")


def _write_run(
    plan: Plan,
    folder: Path,
    device: torch.device,
    seconds: float | None,
    facts: Mapping[str, Any],
) -> None:
    import json

    record = {
        "schema_version": SCHEMA_VERSION,
        "suite": {"hash": plan.suite.hash, **plan.suite.model_dump(mode="json")},
        "testbed": {"name": plan.testbed.spec, "hash": plan.testbed.method.content_hash()},
        "seeds": list(plan.suite.seeds),
        "cells": len(plan.cells),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "finished": seconds is not None,
        "device": _device_name(device),
        "environment": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "packages": {"unmergebench": metadata.version("unmergebench"), **identity.versions()},
        "git": _git(),
        **facts,
    }
    write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _git() -> dict[str, Any]:
    """Commit of the working copy this code runs from, and whether it is edited; {} if none."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A copy inside somebody else's repository must not be taken for ours.
        if git("ls-files", "--error-unmatch", __file__) == "":
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
