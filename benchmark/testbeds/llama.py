"""The papers' own testbeds for language models, on local folders of weights and data.

Everything else is a declared testbed: the tasks are in ``llama-*.toml``.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmark.api.contracts import Card, Dtype
from benchmark.core.errors import AssetError, UsageError
from benchmark.testbeds.declared import Declared, Place
from benchmark.testbeds.declared.schema import TestbedSpec


@dataclass(frozen=True)
class _Llama(Declared):
    """A language model of the papers, or any other in its place.

    Attributes:
        weights: a checkpoint folder (``hf download NAME --local-dir FOLDER``).
        data: a folder with one per task, each of jsonl, csv or parquet files by split.
        adapter: how experts are trained: ``lora`` of rank 16 on q, k, v, o, or ``full``.
        steps, learning_rate, batch_size: of that training.
        max_new: tokens of an answer at most; None: as the tasks say.
        dtype: what releases are stored in.
    """

    file: str = field(default="", init=False, repr=False)
    weights: str = ""
    data: str = ""
    adapter: Literal["lora", "full"] = "lora"
    steps: int = 2000
    learning_rate: float = 1e-4
    batch_size: int = 4
    max_new: int | None = None
    dtype: Dtype = "bfloat16"

    name: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        _ = self.spec

    @property
    def spec(self) -> TestbedSpec:
        content = _toml(self.name)
        folder = Path(self.data).expanduser().resolve()
        shared = content["defaults"] | ({"max_new": self.max_new} if self.max_new else {})
        return TestbedSpec.model_validate(
            {
                **content,
                "name": self.name,
                "summary": self.card.summary,
                "base": self.weights or self.source,
                "dtype": self.dtype,
                "recipe": {
                    "steps": self.steps,
                    "batch_size": self.batch_size,
                    "learning_rate": self.learning_rate,
                    "warmup": min(2000, self.steps // 4),
                    **({"lora": {}} if self.adapter == "lora" else {}),
                },
                "defaults": shared,
                "task": [{**task, "data": str(folder / task["data"])} for task in content["task"]],
            }
        )

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
    def _base(self) -> Place:
        """Raises AssetError: no weights, or no data, are named."""
        if not (self.weights and self.data):
            tasks = ", ".join(self.tasks)
            raise AssetError(
                f"{self.name} needs {self.source} and a folder with its tasks ({tasks}): "
                f"`hf download {self.source} --local-dir FOLDER`, then the testbed "
                f"{self.name}(weights=FOLDER, data=FOLDER)"
            )
        return super()._base


@dataclass(frozen=True)
class Llama31(_Llama):
    """Llama-3.1-8B on GSM8K and ASDiv; see :class:`_Llama`."""

    name: ClassVar[str] = "llama-3.1-8b"
    source: ClassVar[str] = "meta-llama/Llama-3.1-8B"
    card: ClassVar[Card] = Card(
        summary="Llama-3.1-8B on GSM8K and ASDiv, answers generated (Trap²'s protocol)",
        paper="The Llama 3 Herd of Models",
        authors="Llama Team 2024",
        arxiv="2407.21783",
        notes="LoRA, rate, batch and lengths as Trap²'s code; steps and prompts are ours",
    )


@dataclass(frozen=True)
class Llama2(_Llama):
    """Llama-2-7B on Emotion and Twitter; see :class:`_Llama`."""

    name: ClassVar[str] = "llama-2-7b"
    source: ClassVar[str] = "meta-llama/Llama-2-7b-hf"
    card: ClassVar[Card] = Card(
        summary="Llama-2-7B on Emotion and Twitter, label words by likelihood (PaRaMS's protocol)",
        paper="Llama 2: Open Foundation and Fine-Tuned Chat Models",
        authors="Touvron et al. 2023",
        arxiv="2307.09288",
        notes="size of the model, training, prompts and which Twitter data are ours",
    )


@functools.cache
def _toml(name: str) -> dict[str, Any]:
    file = resources.files("benchmark") / "testbeds" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
