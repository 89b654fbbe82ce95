"""The lowest versions that pyproject.toml declares, as constraints for pip.

    python .ci/lowest.py > lowest.txt && pip install -r lowest.txt && pip install --no-deps -e .

Of every dependency and of the extras ``test`` and ``mergekit``. A requirement without a floor is an
error: nobody would know what was tested.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("mergekit", "test")


def floor(line: str) -> str:
    """``pandas>=2.2,<4`` → ``pandas==2.2``."""
    requirement = Requirement(line)
    lowest = [part.version for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    if len(lowest) != 1:
        sys.exit(f"{line}: needs one lowest version, as in {requirement.name}>=1.2")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={lowest[0]}{marker}"


def main() -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in EXTRAS for line in extras[name]]
    print("\n".join(sorted({floor(line) for line in lines})))


if __name__ == "__main__":
    main()
