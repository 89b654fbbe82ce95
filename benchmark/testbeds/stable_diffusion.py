"""PaRaMS's testbed for a generator of images; its tasks are in ``sd-1.5.toml``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from benchmark.api.contracts import Card, Dtype
from benchmark.testbeds.local import Local


@dataclass(frozen=True)
class StableDiffusion15(Local):
    """Stable Diffusion 1.5, or any pipeline of its kind in its place.

    Attributes: those of :class:`Local` (``weights``: a pipeline), and
        judge: the folder of a CLIP that sees what is drawn.
        drawn: steps of the pipeline's scheduler; ``guidance`` by captions.
        samples: images of each caption, in validation and test.
        steps, learning_rate, batch_size: how an expert is trained.
        dtype: what releases are stored in.
    """

    judge: str = ""
    drawn: int = 50
    guidance: float = 7.5
    samples: int = 4
    steps: int = 1000
    learning_rate: float = 1e-5
    batch_size: int = 4
    dtype: Dtype = "float32"

    name: ClassVar[str] = "sd-1.5"
    source: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    named: ClassVar[str] = "weights=FOLDER, data=FOLDER, judge=FOLDER of a CLIP"
    card: ClassVar[Card] = Card(
        summary="Stable Diffusion 1.5 on two sets of captions, seen by a CLIP (PaRaMS's protocol)",
        paper="High-Resolution Image Synthesis with Latent Diffusion Models",
        authors="Rombach et al. 2022",
        arxiv="2112.10752",
        notes="captions, training, steps and guidance are ours; PaRaMS reports two prompts",
    )

    @property
    def missing(self) -> bool:
        return super().missing or not self.judge

    def settings(self) -> dict[str, Any]:
        judge = self.judge or "openai/clip-vit-base-patch32"
        return {
            "dtype": self.dtype,
            "drawing": {"judge": judge, "steps": self.drawn, "guidance": self.guidance},
            "recipe": {
                "steps": self.steps,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "warmup": self.steps // 10,
            },
            "defaults": {"samples": self.samples},
        }
