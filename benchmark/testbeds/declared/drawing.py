"""A pipeline of diffusers that is asked to draw, and a frozen model that sees what it drew.

    caption, seed → the pipeline's sampling, its denoiser lent a State → image → judge's features

An example is one caption and one seed of the noise, so that every State draws from the same noise.
It is right when the judge sees what was asked for: of the task's classes the nearest one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.api.recipe import Batch
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.state import State
from benchmark.testbeds.declared.backbones import Backbone, ImageBackbone
from benchmark.testbeds.declared.pixels import Pixels

#: Bytes of a caption; images that are drawn at once.
_CAPTION, _AT_ONCE = 512, 8


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. ``guidance``: of captions over none; 1 is without."""

    steps: int = 20
    guidance: float = 1.0
    side: int | None = None


class _Run(nn.Module):
    """What lends a State to the denoiser for as long as the pipeline samples."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, work: Any) -> Any:
        return work()


@dataclass(frozen=True, eq=False)
class DrawingBackbone(Backbone):
    """Inputs: ``caption`` (n, bytes) uint8, ``seed`` (n,) int64. Features: what ``judge`` sees.

    ``pipeline``: of diffusers, with ``module`` as its denoiser. ``eyes``: the judge's weights.
    """

    module: Any
    pipeline: Any = None
    judge: ImageBackbone = field(default_factory=lambda: ImageBackbone(nn.Identity(), dict, ""))
    eyes: Mapping[str, Tensor] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    kind: ClassVar[Literal["text"]] = "text"  # what an example is, as its rows are read

    def bare(self) -> Self:
        return replace(super().bare(), judge=self.judge.bare())

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Captions as bytes, cut to 512; seeds are the caller's."""
        out = torch.zeros(len(rows), _CAPTION, dtype=torch.uint8)
        for row, text in enumerate(map(str, rows)):
            said = text.encode()[:_CAPTION]
            out[row, : len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        return {"caption": out}

    @property
    def side(self) -> int:
        """Pixels of an image a side."""
        size = self.sampling.side or self.module.config.get("sample_size")
        if self.sampling.side is None:
            size *= getattr(self.pipeline, "vae_scale_factor", 1)
        return int(size)

    def images(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """What is drawn, (n, 3, h, w) within [0, 1]; differentiable in ``state``."""
        parts = [
            self._draw(state, captions, seeds)
            for captions, seeds in zip(
                inputs["caption"].split(_AT_ONCE), inputs["seed"].split(_AT_ONCE), strict=True
            )
        ]
        return torch.cat(parts)

    def loss(self, state: State, batch: Batch) -> Tensor:
        """E ‖ε(x_t, t, caption) − ε‖², or of the velocity where the scheduler says so.

        Raises:
            MethodError: the task has no images, or this pipeline is trained in another way.
        """
        given, rng = batch.examples.given, batch.rng()
        if "image" not in given:
            raise MethodError("a generator learns from images; name their column (image)")
        pipe, scheduler = self._on(given["image"].device), self.pipeline.scheduler
        kind = scheduler.config.get("prediction_type")
        parts = (getattr(pipe, name, None) for name in ("vae", "unet", "text_encoder"))
        if not all(parts) or kind not in ("epsilon", "v_prediction"):
            raise MethodError(
                f"how a {type(pipe).__name__} is trained is not known here; name experts instead"
            )
        images = given["image"].float() / 127.5 - 1
        with torch.no_grad():
            found = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
            texts = _texts(given["caption"])
            told = pipe.encode_prompt(texts, images.device, 1, False)[0]
        noise = torch.randn(found.shape, generator=rng).to(found.device)
        last = scheduler.config.num_train_timesteps
        times = torch.randint(0, last, (len(found),), generator=rng).to(found.device)
        output = self.call(
            state,
            sample=scheduler.add_noise(found, noise, times),
            timestep=times,
            encoder_hidden_states=told,
        )
        wanted = noise if kind == "epsilon" else scheduler.get_velocity(found, noise, times)
        return functional.mse_loss(output.sample, wanted)

    def _run(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.seen(self.images(state, inputs))

    def seen(self, images: Tensor) -> Tensor:
        """What the judge sees in images within [0, 1]: unit features (n, d)."""
        pixels = self.judge.pixels
        size = (pixels.side, pixels.side)
        small = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        values = {"pixel_values": _normalised(pixels, small)}
        return self.judge.forward(self._judging(images.device), values)

    def _draw(self, state: State, captions: Tensor, seeds: Tensor) -> Tensor:
        device = next(iter(state.values())).device
        pipe = self._on(device)
        call = inspect.unwrap(type(pipe).__call__)  # under torch.no_grad otherwise
        known = inspect.signature(call).parameters
        said = _texts(captions)
        asked: dict[str, Any] = {"prompt": said} if "prompt" in known else {}
        if not asked:
            asked = {"class_labels": [int(text) for text in said]}
        # Noise comes from the CPU wherever the model is, so that it is the same there.
        draws = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        options = {"guidance_scale": self.sampling.guidance}
        if self.sampling.side is not None:
            options |= {"height": self.sampling.side, "width": self.sampling.side}
        wanted = {name: value for name, value in options.items() if name in known}

        def work() -> Any:
            return call(
                pipe,
                **asked,
                **wanted,
                num_inference_steps=self.sampling.steps,
                generator=draws,
                output_type="pt",
            ).images

        lent = {**self._constants(device), **state}
        named = {f"denoiser.{key}": value for key, value in lent.items()}
        drawn = torch.func.functional_call(_Run(self.module), named, args=(work,))
        return drawn if isinstance(drawn, Tensor) else torch.stack(list(drawn))

    def _on(self, device: torch.device) -> Any:
        """The pipeline with all parts but the denoiser on a device."""
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.module:
                part.to(device)
        return self.pipeline

    def _judging(self, device: torch.device) -> State:
        if device not in self._judges:
            self._judges[device] = {k: v.to(device) for k, v in self.eyes.items()}
        return self._judges[device]

    @functools.cached_property
    def _judges(self) -> dict[torch.device, State]:
        return {}


def check_caption(pipeline: Any, texts: Sequence[str], task: str) -> None:
    """Raise UsageError where a pipeline is told classes by number and a caption is none, or a
    caption is too long."""
    if long := [text for text in texts if len(text.encode()) > _CAPTION]:
        raise UsageError(f"task {task}: a caption has over {_CAPTION} bytes: {long[0][:40]!r}…")
    known = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in known:
        return
    if "class_labels" not in known:
        raise UsageError(f"task {task}: a {type(pipeline).__name__} cannot be told what to draw")
    if wrong := [text for text in texts if not text.isdigit()]:
        raise UsageError(
            f"task {task}: a {type(pipeline).__name__} is told classes by their numbers, "
            f"and caption {wrong[0]!r} is none"
        )


def _texts(captions: Tensor) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in captions.tolist()]


def _normalised(pixels: Pixels, images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    return (images - mean) / std
