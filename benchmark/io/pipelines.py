"""Folders of diffusers: one model, or a pipeline whose denoiser is what is merged.

    model_index.json            which parts there are
    unet/ or transformer/       the denoiser: config.json, diffusion_pytorch_model.safetensors
    vae/ text_encoder/ …        carried along as they are

A LoRA of the denoiser has a folder of its own (:mod:`.generator_loras`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from benchmark.core.errors import CheckpointError, brief
from benchmark.core.state import State, compatible
from benchmark.io.loaders import Loaded, main_dtype, quiet

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
#: The part of a pipeline that denoises.
DENOISERS = ("unet", "transformer")
_EXTRA = "diffusers is not installed; pip install 'unmergebench[diffusion]'"


def denoiser(path: Path) -> str | None:
    """Where in ``path`` the denoiser lies: ``""`` for the folder of one model, ``unet``,
    ``transformer``, or None where it is no folder of diffusers.

    Raises:
        CheckpointError: a pipeline without a denoiser, or with two.
    """
    if not (path / INDEX).is_file():
        return "" if "_diffusers_version" in _json(path / "config.json") else None
    parts = parts_of(path)
    found = [part for part in parts if part.startswith(DENOISERS)]
    if len(found) != 1:
        named = " and ".join(found) or "neither unet nor transformer"
        raise CheckpointError(
            f"{path} is a pipeline with {named}; give the folder of the model that is merged"
        )
    return found[0]


def parts_of(path: Path) -> tuple[str, ...]:
    """The parts that a pipeline's index names and that are there, the denoiser among them."""
    listed = _json(path / INDEX)
    return tuple(
        name
        for name, value in listed.items()
        if isinstance(value, list) and Path(name).name == name and (path / name).is_dir()
    )


def model(path: Path, tensors: State) -> Loaded:
    """The model of ``path``, a denoiser's own folder, whose names are those of its file.

    Raises:
        CheckpointError: diffusers lacks, its class is unknown, or the tensors are not its own.
    """
    try:
        import diffusers
    except ImportError:
        raise CheckpointError(f"{path}: {_EXTRA}") from None
    config = _json(path / "config.json")
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise CheckpointError(f"{path}: diffusers has no model {name}; update it")
    made: Any = cls
    with quiet():
        try:
            built: nn.Module = made.from_config(config)
        # A configuration may hold anything, and diffusers then raises anything.
        except Exception as error:
            raise CheckpointError(f"cannot use {path / 'config.json'}: {brief(error)}") from None
    dtype = main_dtype(tensors)
    wanted = {
        key: value.to(tensors[key].dtype if key in tensors else dtype)
        for key, value in built.state_dict().items()
    }
    used = {key: value for key, value in tensors.items() if key in wanted}
    compatible(used, wanted, str(path))
    built.load_state_dict(used)
    return Loaded(built.eval().requires_grad_(False), {key: key for key in used}, {})


def _json(file: Path) -> dict[str, Any]:
    """The content of a file of JSON; nothing where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
