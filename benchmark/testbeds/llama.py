"""The papers' own testbeds for language models; their tasks are in ``llama-*.toml``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from benchmark.api.contracts import Card, Dtype
from benchmark.testbeds.local import Local


@dataclass(frozen=True)
class _Llama(Local):
    """A language model of the papers, or any other in its place.

    Attributes: those of :class:`Local`, and
        adapter: how experts are trained: ``lora`` of rank 16 on q, k, v, o, or ``full``.
        steps, learning_rate, batch_size: of that training.
        max_new: tokens of an answer at most; None: as the tasks say.
        dtype: what releases are stored in.
    """

    adapter: Literal["lora", "full"] = "lora"
    steps: int = 2000
    learning_rate: float = 1e-4
    batch_size: int = 4
    max_new: int | None = None
    dtype: Dtype = "bfloat16"

    def settings(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "recipe": {
                "steps": self.steps,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "warmup": min(2000, self.steps // 4),
                **({"lora": {}} if self.adapter == "lora" else {}),
            },
            "defaults": {"max_new": self.max_new} if self.max_new else {},
        }


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
