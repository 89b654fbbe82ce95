"""Execute a plan into a run folder: resumable, and each cell written as soon as it is known."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError

from benchmark.core.errors import UnmergeBenchError, UsageError
from benchmark.core.paths import cache, replacing, write_text
from benchmark.core.records import SCHEMA_VERSION, Cell
from benchmark.pipeline import apart, identity
from benchmark.pipeline.plan import Plan, Planned
from benchmark.pipeline.store import Store

#: Hears (finished cells, all cells, newest cell or None) and what is being done now.
Progress = Callable[[int, int, Cell | None], None]


def read_cells(folder: Path) -> list[Cell]:
    """The cells of a run folder; a last line cut short by a crash is left out.

    Raises:
        UnmergeBenchError: no cells there, or a line that is damaged.
    """
    path = folder / "cells.jsonl"
    if not path.is_file():
        raise UnmergeBenchError(f"{folder} holds no run (no cells.jsonl); name a run folder")
    text = path.read_text(encoding="utf-8")
    whole = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    cells = []
    for number, line in enumerate(whole, start=1):
        try:
            cells.append(Cell.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            raise UnmergeBenchError(
                f"{path}:{number}: {problem['msg']}; delete the line and run again"
            ) from None
    return cells


def judged_cells(folder: Path) -> list[Cell]:
    """The cells of a run folder, to put together.

    Raises:
        UnmergeBenchError: as :func:`read_cells`; or made by a version with other rules, whose cells
            lack what today's verdicts follow from.
    """
    cells = read_cells(folder)
    if any(cell.gain is not None and cell.gain_reference is None for cell in cells):
        raise UnmergeBenchError(
            f"{folder} was made by an earlier version of UnmergeBench; run it again"
        )
    return cells


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run folder."""
    import json

    path = folder / "run.json"
    if not path.is_file():
        raise UnmergeBenchError(f"{folder} holds no run (no run.json); name a run folder")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UnmergeBenchError(
            f"{path} is damaged ({error}); run again into another folder"
        ) from None


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
    wanted = {planned.key for planned in plan.cells}
    before = read_cells(folder) if path.exists() else []
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
    elif folder.exists() and any(f for f in folder.iterdir() if f.name != ".lock"):
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
