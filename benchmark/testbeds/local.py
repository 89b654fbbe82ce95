"""The papers' own testbeds on local folders of weights and data: declared ones, filled in."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from abc import abstractmethod
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from benchmark.core.errors import AssetError, UsageError
from benchmark.testbeds.declared import Declared, Place
from benchmark.testbeds.declared.schema import TestbedSpec


@dataclass(frozen=True)
class Local(Declared):
    """A paper's testbed, whose tasks are in ``NAME.toml`` beside this file.

    Attributes:
        weights: a checkpoint folder (``hf download NAME --local-dir FOLDER``).
        data: a folder with one per task, each of jsonl, csv or parquet files by split.
    """

    file: str = field(default="", init=False, repr=False)
    weights: str = ""
    data: str = ""

    name: ClassVar[str]
    #: What ``weights`` is a copy of, on the hub.
    source: ClassVar[str]

    def __post_init__(self) -> None:
        _ = self.spec

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the parameters say, over what the file says."""

    @property
    def spec(self) -> TestbedSpec:
        content, own = _toml(self.name), self.settings()
        folder = Path(self.data).expanduser().resolve()
        own["defaults"] = content["defaults"] | own.get("defaults", {})
        tasks = [{**task, "data": str(folder / task["data"])} for task in content["task"]]
        base = {
            "name": self.name,
            "summary": self.card.summary,
            "base": self.weights or self.source,
        }
        return TestbedSpec.model_validate({**content, **base, **own, "task": tasks})

    @property
    def root(self) -> Path:
        return Path.cwd()

    def content_hash(self) -> str:
        """As of any declared testbed; what is not here yet is absent."""
        try:
            return super().content_hash()
        except (AssetError, UsageError):
            return hashlib.sha256(self.spec.model_dump_json().encode()).hexdigest()

    @property
    def missing(self) -> bool:
        """Whether a folder is not named."""
        return not (self.weights and self.data)

    #: How the folders are named.
    named: ClassVar[str] = "weights=FOLDER, data=FOLDER"

    @property
    def _base(self) -> Place:
        """Raises AssetError: no weights, or no data, are named."""
        if self.missing:
            raise AssetError(
                f"{self.name} needs {self.source} and a folder with its tasks "
                f"({', '.join(self.tasks)}): `hf download {self.source} --local-dir FOLDER`, then "
                f"the testbed {self.name}({self.named})"
            )
        return super()._base


@functools.cache
def _toml(name: str) -> dict[str, Any]:
    file = resources.files("benchmark") / "testbeds" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
