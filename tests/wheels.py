"""Small wheels for tests of assets: really downloadable by pip, from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from benchmark.io.assets import Asset

FILES = {
    "sample/data/a.txt": "alpha",
    "sample/data/b.txt": "beta",
    "sample/data/deep/c.txt": "gamma",
    "sample/__init__.py": "raise SystemExit('a package of assets was imported')",
}


def make(folder: Path, files: dict[str, str] = FILES, package: str = "sample-data") -> Path:
    """A wheel ``package`` 1.0 in ``folder`` that holds ``files``."""
    stem = package.replace("-", "_")
    meta = {
        f"{stem}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{stem}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        f"{stem}-1.0.dist-info/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, **meta}.items():
            archive.writestr(name, text)
    return path


def pin(wheel: Path, *files: str) -> Asset:
    """The asset for ``files`` of a wheel of :func:`make`."""
    package = wheel.name.split("-")[0].replace("_", "-")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Asset(package, "1.0", digest, files, size=wheel.stat().st_size)
