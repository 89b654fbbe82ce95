"""A pipeline folder → a backbone that draws."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import nn

from benchmark.core.errors import CheckpointError, UsageError, brief
from benchmark.io import pipelines
from benchmark.io.folders import load
from benchmark.io.loaders import quiet
from benchmark.testbeds.declared import bodies
from benchmark.testbeds.declared.backbones import ImageBackbone
from benchmark.testbeds.declared.drawing import DrawingBackbone, Sampling
from benchmark.testbeds.declared.opening import open_backbone
from benchmark.testbeds.declared.places import Place, folder

_REVISION = 1  # of what is drawn and seen: raise it when that changes


def open_drawing(base: Place, judge: Place, sampling: Sampling) -> DrawingBackbone:
    """The backbone of a pipeline folder and of what sees; always the same object.

    Raises:
        CheckpointError: no pipeline, or one that is damaged.
        UsageError: the judge sees no images.
    """
    return _open(base, judge, sampling, base.content, judge.content)


@functools.lru_cache(maxsize=2)
def _open(
    base: Place, judge: Place, sampling: Sampling, content: str, seen: str
) -> DrawingBackbone:
    path = folder(base)
    if not (path / pipelines.INDEX).is_file():
        raise UsageError(f"{path}: judge goes with the folder of a pipeline ({pipelines.INDEX})")
    eyes = open_backbone(judge)
    if not isinstance(eyes, ImageBackbone):
        raise UsageError(f"judge {folder(judge)} sees no images; give a CLIP or an image model")
    checkpoint = load(path)
    model = checkpoint.model.float()
    state, constants = bodies.floats(model), bodies.constants(model)
    made = _pipeline(path, checkpoint.inner, model)
    bodies.to_meta(model)
    identity = [_REVISION, content, seen, astuple(sampling)]
    return DrawingBackbone(
        module=model,
        weights=lambda: state,
        content=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        constants=constants,
        pipeline=made,
        judge=eyes,
        eyes=eyes.base(),
        sampling=sampling,
    )


def _pipeline(path: Path, inner: str, model: nn.Module) -> Any:
    """The pipeline of a folder around a denoiser that is loaded already. No code of the folder's
    own is run."""
    import diffusers

    with quiet():
        bars = diffusers.utils.logging.is_progress_bar_enabled()
        diffusers.utils.logging.disable_progress_bar()
        try:
            made: Any = diffusers.DiffusionPipeline.from_pretrained(
                path, **{inner: model}, local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        # A folder may hold anything, and diffusers then raises anything.
        except Exception as error:
            raise CheckpointError(f"{path}: diffusers cannot use it: {brief(error)}") from None
        finally:
            if bars:
                diffusers.utils.logging.enable_progress_bar()
    made.set_progress_bar_config(disable=True)
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.float().eval().requires_grad_(False)
    return made
