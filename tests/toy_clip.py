"""Tiny random CLIPs and striped images in the hub's own formats, for the CLIP testbeds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SIDE = 16
_VOCABULARY = 49408  # of CLIP's own tokenizer, which open_clip brings


def open_clip_folder(folder: Path, **vision: Any) -> Path:
    """A random open_clip model; ``vision`` replaces its ViT."""
    import open_clip

    folder.mkdir(parents=True)
    vit = {"patch_size": 8, "layers": 2, "width": 32, "head_width": 8, "mlp_ratio": 2.0}
    text = {"context_length": 77, "vocab_size": _VOCABULARY, "width": 16, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, **(vision or vit)},
        "text_cfg": text,
    }
    content = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(content)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False
        )
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def picture(label: int, of: int, rng: np.random.Generator) -> Image.Image:
    """Stripes whose direction is the class, under noise: no two are alike."""
    angle = np.pi * label / of
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 1.2)[..., None]
    noise = rng.normal(0, 0.3, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(127 + 90 * (wave + noise), 0, 255).astype(np.uint8))


def labels(classes: int, n: int) -> list[int]:
    return [row % classes for row in range(n)]


def parquet(folder: Path, classes: int, train: int = 60, test: int = 24, seed: int = 0) -> Path:
    """``folder`` in the form in which the hub has the eight tasks."""
    import datasets

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for part, n in (("train", train), ("test", test)):
        rows: dict[str, list[Any]] = {"image": [], "label": labels(classes, n)}
        for label in rows["label"]:
            png = io.BytesIO()
            picture(label, classes, rng).save(png, "png")
            rows["image"].append({"bytes": png.getvalue(), "path": None})
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return folder


def images(folder: Path, names: list[str], train: int = 60, test: int = 24, seed: int = 0) -> Path:
    """``folder`` as PART/CLASS/*.png."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("test", test)):
        for row, label in enumerate(labels(len(names), n)):
            place = folder / part / names[label]
            place.mkdir(parents=True, exist_ok=True)
            picture(label, len(names), rng).save(place / f"{row:04d}.png")
    return folder
