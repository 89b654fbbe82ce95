"""The tiny models of :mod:`zoo` as checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor
from zoo import HEADS, HIDDEN, LAYERS, LENGTH, VOCABULARY, WIDTH, tiny

from benchmark.core.outputs import MARKER

_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 8,
        "patch_size": 4,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    },
}


def write(name: str, folder: Path, **options: Any) -> Path:
    """The model ``name`` in ``folder``; ``options`` go to ``save_pretrained``."""
    model: Any = tiny(name)[0]
    if not name.startswith("open-clip"):
        model.save_pretrained(folder, **options)
        return folder
    folder.mkdir()
    config = {**_OPEN_CLIP, "custom_text": name.endswith("custom-text")}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, copied: one that stays mapped could not be overwritten."""
    return load(file.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the list of what was made, by relative path."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != MARKER
    }
