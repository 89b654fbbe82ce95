"""LoRA of a denoiser in diffusers' own format: ``pytorch_lora_weights.safetensors``.

    unet.down_blocks.0. … .to_q.lora_A.weight      (r, in);  lora_B (out, r)

Reading is left to diffusers, which merges the factors into the denoiser (``fuse_lora``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.core.errors import CheckpointError, brief
from benchmark.core.state import compatible, finite
from benchmark.io import folders, pipelines, tensorfiles
from benchmark.io.folders import Checkpoint
from benchmark.io.loaders import quiet

WEIGHTS = pipelines.LORA
_NAME = "given"


def is_lora(path: Path) -> bool:
    """Whether a folder holds LoRA weights of diffusers and no model of its own."""
    return (path / WEIGHTS).is_file() and not any((path / c).is_file() for c in folders.CONFIGS)


def merged(path: Path, base: Checkpoint) -> dict[str, torch.Tensor]:
    """The State of ``base``, a denoiser in float32, with the factors in ``path`` merged in.

    Raises:
        CheckpointError: unreadable, not finite, of another denoiser, or more than factors.
    """
    _, tensors = tensorfiles.read(path / WEIGHTS)
    finite(tensors, str(path))
    prefix = prefix_of(base)
    strange = [key for key in tensors if not key.startswith(f"{prefix}.")]
    if strange:
        raise CheckpointError(
            f"{path} adapts {strange[0].partition('.')[0]!r} too, and only {prefix!r} is merged; "
            "fuse it into that part of the pipeline first"
        )
    if dora := [key for key in tensors if "lora_" not in key and ".lora." not in key]:
        raise CheckpointError(f"{path} holds {dora[0]!r}, which is no factor of a B·A")
    model: Any = copy.deepcopy(base.model).float()
    model.load_state_dict(base.state, strict=False)
    with quiet():
        try:
            model.load_lora_adapter(
                str(path), prefix=prefix, adapter_name=_NAME, weight_name=WEIGHTS,
                use_safetensors=True, local_files_only=True,
            )  # fmt: skip
            held = sum(".lora_" in name for name, _ in model.named_parameters())
            model.fuse_lora()
            model.unload_lora()
        # A file may name anything, and diffusers and peft then raise anything.
        except Exception as error:
            raise CheckpointError(f"{path} does not fit this base: {brief(error)}") from None
    factors = sum(value.ndim > 1 for value in tensors.values())
    if held != factors:
        raise CheckpointError(
            f"{path} does not fit this base: {held} of its {factors} factors have a place there"
        )
    found = model.state_dict()
    state = {
        key: value if torch.equal(found[key], value) else found[key].detach().clone()
        for key, value in base.state.items()
    }
    compatible(state, base.state, f"LoRA {path} on its base")
    return state


def prefix_of(base: Checkpoint) -> str:
    """What stands before the names of the denoiser's modules."""
    named = type(base.model).__name__
    return base.inner or next((d for d in pipelines.DENOISERS if d in named.lower()), "transformer")


def save(
    factors: dict[str, torch.Tensor],
    base: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    sources: Sequence[Path] = (),
) -> None:
    """Write factors, by ``module.lora_A.weight``, whose alpha is their rank."""
    prefix = prefix_of(base)
    tensors = {f"{prefix}.{name}": value for name, value in factors.items()}
    with folders.replacing(out, [base.path, *sources], force) as temporary:
        tensorfiles.save(temporary / WEIGHTS, tensors, {"format": "pt"})
