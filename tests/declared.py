"""Folders in the hub's own formats, tiny and random: checkpoints with tokenizers, and data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from PIL import Image

from benchmark.testbeds.declared import Input, open_backbone, place
from benchmark.testbeds.declared.backbones import Backbone

CLASSES = ("dark", "light")
WORDS = ("dark", "light", "a", "photo", "of", "night", "coal", "ink", "snow", "milk", "sun", "salt")
COUNTS = {"train": 60, "test": 24}
VISION = """
name = "mine"
base = "vit"
side = 8
[recipe]
steps = 4
learning_rate = 1e-3
[[task]]
name = "one"
data = "one"
[[task]]
name = "two"
data = "two"
max_validation = 5
"""


def tokenizer(folder: Path) -> None:
    """One token per word; CLIP's end-of-text token (1) closes every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "<pad>", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def checkpoint(folder: Path, name: str) -> Path:
    """The zoo's model ``name`` as ``save_pretrained`` writes it."""
    model, _ = zoo.tiny(name)
    model.save_pretrained(folder)
    if name in ("clip", "bert"):
        tokenizer(folder)
    return folder


def open_clip_folder(folder: Path) -> Path:
    """A tiny open_clip model with the library's own vocabulary."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 8, "image_size": 8, "patch_size": 4},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    model = open_clip.CLIP(**config)
    folder.mkdir()
    norm = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": norm})
    )
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    return folder


def pictures(count: int, seed: int) -> list[tuple[Image.Image, int]]:
    """Noise of 10 × 12 pixels, dark (0) or light (1)."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        noise = rng.integers(0, 110, (10, 12, 3), dtype=np.uint8)
        out.append((Image.fromarray(noise + np.uint8(140 * (i % 2))), i % 2))
    return out


def imagefolder(folder: Path, counts: dict[str, int]) -> Path:
    for seed, (split, count) in enumerate(counts.items()):
        for i, (image, label) in enumerate(pictures(count, seed)):
            where = folder / split / CLASSES[label]
            where.mkdir(parents=True, exist_ok=True)
            image.save(where / f"{i}.png")
    return folder


def parquet(folder: Path, counts: dict[str, int], feature: bool = True) -> Path:
    """Images as ``datasets`` writes them; without the feature: a bare struct of bytes and path."""
    import datasets

    folder.mkdir(parents=True)
    for seed, (split, count) in enumerate(counts.items()):
        rows = pictures(count, seed)
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
        )
        data = datasets.Dataset.from_dict(columns, features=features)
        path = folder / f"{split}.parquet"
        data.to_parquet(str(path))
        if not feature:
            import pyarrow.parquet as pq

            pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    return folder


def texts(count: int, seed: int) -> Iterable[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    kinds = (("night", "coal", "ink"), ("snow", "milk", "sun", "salt"))
    for i in range(count):
        words = [str(rng.choice(kinds[i % 2])) for _ in range(4)] + [f"x{i}"]
        yield " ".join(words), CLASSES[i % 2]


def csv(folder: Path, counts: dict[str, int]) -> Path:
    folder.mkdir(parents=True)
    for seed, (split, count) in enumerate(counts.items()):
        lines = ["sentence,kind", *(f"{text},{label}" for text, label in texts(count, seed))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write(folder: Path, text: str, name: str = "testbed.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def brightness(pixels: torch.Tensor) -> torch.Tensor:
    """1 for the light images among uint8 ``pixels`` (n, 3, h, w)."""
    return (pixels.float().mean((1, 2, 3)) > 128).long()


def backbone(folders: Path, name: str, **wanted: Any) -> Backbone:
    return open_backbone(place(name, folders, None, "base"), Input(**wanted))
