"""A generator of handwriting that is trained here: flow matching on scikit-learn's digits.

A model moves noise along its velocity field to an image of the class asked for. An example is one
noise and one class; it is right when a frozen classifier, trained here on real images, sees that
class in the image. The base knows the images and not their classes: its own were random.

Lipman et al. 2023 (arXiv 2210.02747): x_t = (1 − t)·ε + t·x, the velocity x − ε is learnt by least
squares, images are drawn in ``euler`` steps from t = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.api.contracts import Arena, Card, Testbed
from benchmark.api.recipe import Batch, Recipe
from benchmark.api.specs import did_you_mean
from benchmark.core.data import Split, Task
from benchmark.core.errors import MethodError, UsageError
from benchmark.core.keys import sha
from benchmark.core.sources import fingerprint as source_hash
from benchmark.core.state import State
from benchmark.learn.training import at_most, fine_tune
from benchmark.testbeds import samples, small_vit
from benchmark.testbeds.kept import hashed_fields, kept

#: Threads that draw; to learn from small batches one is best.
_DRAWING = 2
_WIDTH, _LAYERS, _HEADS, _SIDE, _PATCH = 64, 4, 4, 8, 2
_CODE = 8  # numbers that say a class, each a plane beside the image
_TIMES = 3  # planes that say t
_CLASSES = 20  # ten digits, and the same in white on black
_SIZES = {"validation": 200, "test": 500}
_PRETRAINING = Recipe(steps=700, batch_size=128, learning_rate=2e-3, warmup=50)
_CLASSIFYING = 30  # epochs
#: Task → classes.
TASKS = {"low": range(5), "high": range(5, 10), "inverted": range(10, 15)}


class Classifier(NamedTuple):
    """A frozen network on images (n, 1, 8, 8): unit features (n, 64), and a head on them."""

    first: Tensor
    second: Tensor
    third: Tensor
    head: Tensor

    def features(self, images: Tensor) -> Tensor:
        """Differentiable in the images."""
        return functional.normalize(self.raw(images), dim=-1)

    def raw(self, images: Tensor) -> Tensor:
        """The features before they are unit vectors."""
        hidden = functional.gelu(functional.conv2d(images, self.first, padding=1))
        hidden = functional.gelu(functional.conv2d(hidden, self.second, padding=1, stride=2))
        return hidden.flatten(1) @ self.third.T

    def to(self, device: torch.device) -> Classifier:
        return Classifier(*(part.to(device) for part in self))


@dataclass(frozen=True)
class DiffusionDigits(Testbed):
    """A transformer of four layers that draws digits; skills are classes, and a style.

    ``low``, ``high``: five digits each; ``inverted``: the first five in negative. ``steps``,
    ``learning_rate``: how an expert is trained (AdamW, 20 steps of warm-up, batch 64). ``euler``:
    steps in which an image is drawn.
    """

    steps: int = 400
    learning_rate: float = 2e-3
    euler: int = 20

    threads: ClassVar[int | None] = 1
    card: ClassVar[Card] = Card(
        summary="flow-matching transformer that draws scikit-learn's digits, trained here",
        paper="Flow Matching for Generative Modeling",
        authors="Lipman et al. 2023",
        arxiv="2210.02747",
        notes="small: its images are 8 × 8, and its numbers say little about large models",
    )

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or min(self.steps, self.euler) < 1:
            raise ValueError("learning_rate, steps and euler must be positive")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(TASKS)

    @property
    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, batch_size=64, learning_rate=self.learning_rate, warmup=20)

    def content_hash(self) -> str:
        return sha([hashed_fields(self), source_hash(__name__)])

    def base(self) -> State:
        return kept("diffusion-digits-base", sha(source_hash(__name__)), self._pretrain)

    def module(self) -> torch.nn.Module:
        return _skeleton()

    def arena(self) -> Arena:
        return Drawing(self.euler, _classifier())

    def task(self, name: str) -> Task:
        """Noise and classes; training examples have real images besides, as their answers.

        Raises:
            UsageError: no such task.
        """
        if name not in TASKS:
            raise UsageError(f"diffusion-digits has no task {name!r}{did_you_mean(name, TASKS)}")
        classes = TASKS[name]
        images, labels = real("train")
        rows = ((labels >= classes.start) & (labels < classes.stop)).nonzero()[:, 0]
        splits = {"train": _asked(labels[rows], 0, images[rows])}
        for part, size in _SIZES.items():
            each = torch.arange(classes.start, classes.stop).repeat(-(-size // len(classes)))
            splits[part] = _asked(each[:size], len(splits))
        names = tuple(f"{label % 10}{' inverted' * (label >= 10)}" for label in range(_CLASSES))
        return Task(name, names, **splits, head=_classifier().head, scale=20.0)

    def initialise(self, rng: torch.Generator) -> State:
        positions = ("cls_token", "position_embeddings")
        return small_vit.initialise(_skeleton(), rng, lambda key: key.endswith(positions))

    @property
    def draws(self) -> bool:
        return True

    def loss(self, state: State, batch: Batch) -> Tensor:
        return self._drawing.loss(state, batch)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the classifier makes of the images drawn: unit vectors (n, 64)."""
        return self._drawing.features(state, inputs)

    def images(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """The images drawn, (n, 1, 8, 8) within about [-1, 1]."""
        return self._drawing.images(state, inputs)

    def quality(self, state: State, task: Task) -> dict[str, float]:
        """Fréchet distance, precision and recall of what is drawn for the test split, against the
        held-out real images of its classes, in the classifier's features."""
        images, labels = real("test")
        images = images[torch.isin(labels, task.test.labels.cpu())]
        with torch.inference_mode():
            drawn = self.images(state, task.test.inputs).cpu()
            return samples.measures(*(_classifier().raw(some) for some in (drawn, images)))

    def pictures(self, state: State, task: Task) -> Tensor:
        """The first two of each class, black on white."""
        labels = task.test.labels
        rows = torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()])
        with torch.inference_mode():
            drawn = self.images(state, task.test[rows].inputs)
        return (1 - drawn[:, 0].clamp(-1, 1)) / 2

    @property
    def _drawing(self) -> Drawing:
        return Drawing(self.euler, _classifier())

    def _pretrain(self) -> State:
        rng = torch.Generator().manual_seed(0)
        images, labels = real("train")
        public = _asked(labels[torch.randperm(len(labels), generator=rng)], 9, images)
        task = Task("public", ("",), public, public, public, _classifier().head, 1.0)
        start = self.initialise(rng)
        return fine_tune(
            self, {"public": task}, start, {"public": public}, rng, recipe=_PRETRAINING
        )


@dataclass(frozen=True)
class Drawing:
    """How a State draws, and learns to."""

    euler: int
    classifier: Classifier

    def module(self) -> torch.nn.Module:
        return _skeleton()

    def loss(self, state: State, batch: Batch) -> Tensor:
        """E ‖v(x_t, t, class) − (x − ε)‖² over the pixels.

        Raises:
            MethodError: the examples have no images to learn from.
        """
        given = batch.examples.given
        if "image" not in given:
            raise MethodError("a generator learns from images, and these examples have none")
        images, rng = given["image"], batch.rng()
        noise = torch.randn(images.shape, generator=rng).to(images.device)
        t = torch.rand(len(images), 1, 1, 1, generator=rng).to(images.device)
        moved = self._velocity(state, torch.lerp(noise, images, t), t, given["code"])
        return (moved - (images - noise)).square().mean()

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`DiffusionDigits.features`."""
        images = self.images(state, inputs)
        return self.classifier.to(images.device).features(images)

    def images(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`DiffusionDigits.images`."""
        images = inputs["noise"]
        for step in range(self.euler):
            t = images.new_full((len(images), 1, 1, 1), step / self.euler)
            images = images + self._velocity(state, images, t, inputs["code"]) / self.euler
        return images

    def _velocity(self, state: State, images: Tensor, t: Tensor, code: Tensor) -> Tensor:
        angle = 2 * torch.pi * t
        times = torch.cat([2 * t - 1, angle.sin(), angle.cos()], 1)
        said = torch.cat([code[:, :, None, None], times], 1).expand(-1, -1, _SIDE, _SIDE)
        planes = {"pixel_values": torch.cat([images, said], 1)}
        with at_most(_DRAWING if torch.is_inference_mode_enabled() else DiffusionDigits.threads):
            output = torch.func.functional_call(_skeleton(), state, kwargs=planes)
        patches = output.last_hidden_state[:, 1:] @ _projection().to(images.device)
        return functional.fold(patches.mT, _SIDE, _PATCH, stride=_PATCH)


def _asked(labels: Tensor, seed: int, images: Tensor | None = None) -> Split:
    """Fixed noise and the code of each class, with real images as what is to be drawn."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 1, _SIDE, _SIDE, generator=rng)
    answers = {} if images is None else {"image": images}
    return Split({"noise": noise, "code": _codes()[labels]}, labels, answers)


def _skeleton() -> torch.nn.Module:
    return small_vit.skeleton(
        width=_WIDTH,
        layers=_LAYERS,
        heads=_HEADS,
        side=_SIDE,
        patch=_PATCH,
        channels=1 + _CODE + _TIMES,
    )


@functools.lru_cache(maxsize=1)
def _codes() -> Tensor:
    """A frozen code of each class, (20, 8)."""
    return torch.randn(_CLASSES, _CODE, generator=torch.Generator().manual_seed(1))


@functools.lru_cache(maxsize=1)
def _projection() -> Tensor:
    """What the last norm gives of a patch → its pixels, frozen: (64, 4), orthonormal."""
    rng = torch.Generator().manual_seed(2)
    return torch.linalg.qr(torch.randn(_WIDTH, _PATCH**2, generator=rng))[0].contiguous()


def real(part: str) -> tuple[Tensor, Tensor]:
    """Real images (n, 1, 8, 8) within [-1, 1] and classes: ``train``, or the 40 % held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = int(0.4 * len(order))
    rows = order[held:] if part == "train" else order[:held]
    return torch.cat([images[rows], -images[rows]]), torch.cat([labels[rows], labels[rows] + 10])


@functools.lru_cache(maxsize=1)
def _classifier() -> Classifier:
    found = kept("diffusion-digits-classifier", sha(source_hash(__name__)), _classify)
    return Classifier(**found)


def _classify() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = {"first": (32, 1, 3, 3), "second": (64, 32, 3, 3), "third": (64, 1024),
              "head": (_CLASSES, 64)}  # fmt: skip
    parts = {
        name: torch.randn(shape, generator=rng) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        for name, shape in shapes.items()
    }
    for part in parts.values():
        part.requires_grad_()
    images, labels = real("train")
    optimizer = torch.optim.AdamW(parts.values(), lr=2e-3)
    with at_most(1), torch.enable_grad():
        for _ in range(_CLASSIFYING):
            for rows in torch.randperm(len(labels), generator=rng).split(64):
                noisy = images[rows] + 0.1 * torch.randn(images[rows].shape, generator=rng)
                head = functional.normalize(parts["head"], dim=-1)
                features = Classifier(**parts).features(noisy)
                loss = functional.cross_entropy(20 * features @ head.T, labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    made = {name: part.detach() for name, part in parts.items()}
    return {**made, "head": functional.normalize(made["head"], dim=-1)}
