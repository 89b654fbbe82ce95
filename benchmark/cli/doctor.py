"""``doctor``: is everything here that a run needs?"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
import tempfile
from typing import Literal, NamedTuple

import typer

from benchmark.cli.output import Json, console, print_json, table

Verdict = Literal["ok", "note", "broken"]
_PYTHON = (3, 11)
_ROOM = 2e9  # bytes that a `quick` run's assets and checkpoints may need


class Finding(NamedTuple):
    """One line of the report; only ``broken`` makes the command fail."""

    what: str
    verdict: Verdict
    found: str


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("doctor")(doctor)


def doctor(as_json: Json = False) -> None:
    """Check Python, packages, devices, cache and assets; exit code 1 if a run could not work.

    [bold]Examples[/bold]

      unmergebench doctor

      unmergebench doctor --json
    """
    findings = [_python(), *_packages(), _device(), _cache(), *_assets()]
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        console().print(table("", list(Finding._fields), findings))
    if any(finding.verdict == "broken" for finding in findings):
        raise typer.Exit(1)


def _python() -> Finding:
    verdict: Verdict = "ok" if sys.version_info >= _PYTHON else "broken"
    needed = "" if verdict == "ok" else f"; {'.'.join(map(str, _PYTHON))} or newer is needed"
    return Finding(
        "python", verdict, f"{platform.python_version()} on {platform.machine()}{needed}"
    )


def _packages() -> list[Finding]:
    """The project's own requirements, as installed."""
    from packaging.requirements import Requirement

    findings = []
    for line in importlib.metadata.requires("unmergebench") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        findings.append(_package(requirement.name, str(requirement.specifier)))
    return findings


def _package(name: str, wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    remedy = f"run `pip install '{name}{wanted}'`"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "broken", f"not installed; {remedy}")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, "broken", f"{version}, but {wanted} is needed; {remedy}")
    return Finding(name, "ok", version)


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("device", "broken", f"torch cannot be imported: {error}")
    if torch.cuda.is_available():
        return Finding("device", "ok", f"cuda: {torch.cuda.get_device_name()}")
    threads = torch.get_num_threads()
    return Finding("device", "ok", f"cpu, {threads} thread{'s' * (threads > 1)} (no CUDA device)")


def _cache() -> Finding:
    from benchmark.core.paths import cache

    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}; set UNMERGEBENCH_CACHE"
        return Finding("cache", "broken", reason)
    room = f"{folder}, {free / 1e9:.1f} GB free"
    if free < _ROOM:
        return Finding("cache", "note", f"{room}; a run may need {_ROOM / 1e9:.0f} GB")
    return Finding("cache", "ok", room)


def _assets() -> list[Finding]:
    from benchmark.cli import assets
    from benchmark.io.assets import available, verify

    findings = []
    for asset, testbeds in assets.known().values():
        users = ", ".join(testbeds)
        if verify(asset):
            findings.append(Finding(asset.name, "ok", f"in the cache, hashes agree ({users})"))
            continue
        where = available(asset)
        verdict: Verdict = "note" if where else "broken"
        found = f"not in the cache; {where or 'the package index does not answer for it'} ({users})"
        if not where:
            found += "; check `pip config list`, or name a folder of wheels in UNMERGEBENCH_WHEELS"
        elif asset.folder().exists():
            found = re.sub("^not in", "damaged in", found)
        findings.append(Finding(asset.name, verdict, found))
    return findings
