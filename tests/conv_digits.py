"""Small convolutional networks on the data of the testbed `digits`.

The base sees the ten digits of MNIST with batch norms in training mode, which fills their running
statistics as a public model's are filled; experts are then trained by the benchmark's own loop.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Card, Testbed
from benchmark.api.recipe import Recipe
from benchmark.core.data import Task
from benchmark.core.state import State
from benchmark.testbeds.digits import Digits

WIDTH = 64


@dataclass(frozen=True)
class ConvDigits(Testbed):
    """A ResNet or ConvNeXt of two stages; the features are its pooled outputs."""

    kind: Literal["resnet", "convnext"] = "resnet"
    steps: int = 60

    threads: ClassVar[int | None] = 1
    card: ClassVar[Card] = Card("small convolutional networks on digits, for tests")

    @property
    def tasks(self) -> tuple[str, ...]:
        return Digits().tasks

    @property
    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, learning_rate=5e-4, warmup=10)

    def content_hash(self) -> str:
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()

    def task(self, name: str) -> Task:
        return Digits().task(name)

    def module(self) -> nn.Module:
        return skeleton(self.kind)

    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.module())

    def base(self) -> State:
        return dict(pretrained(self.kind))

    def initialise(self, rng: torch.Generator) -> State:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
            return dict(build(self.kind).state_dict())

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(self.module(), state, kwargs=dict(inputs))
        return functional.normalize(output.last_hidden_state.mean((2, 3)), dim=-1)


def build(kind: str) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

    widths = [WIDTH // 2, WIDTH]
    if kind == "resnet":
        return ResNetModel(
            ResNetConfig(
                num_channels=1,
                embedding_size=WIDTH // 2,
                hidden_sizes=widths,
                depths=[1, 1],
                layer_type="basic",
            )
        )
    return ConvNextModel(
        ConvNextConfig(
            num_channels=1,
            patch_size=2,
            num_stages=2,
            hidden_sizes=widths,
            depths=[1, 1],
            layer_scale_init_value=0.1,
        )
    )


@functools.cache
def skeleton(kind: str) -> nn.Module:
    with torch.device("meta"):
        return build(kind).eval()


@functools.cache
def pretrained(kind: str) -> State:
    """Trained on all ten digits with a linear head, which is then thrown away. Shared."""
    halves = [Digits().task(f"mnist-{half}").train for half in ("low", "high")]
    images = torch.cat([half.inputs["pixel_values"] for half in halves])
    labels = torch.cat([half.labels + 5 * i for i, half in enumerate(halves)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, head = build(kind).train(), nn.Linear(WIDTH, 10)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(80):
        rows = torch.randint(len(images), (64,), generator=rng)
        pooled = model(images[rows]).last_hidden_state.mean((2, 3))
        loss = functional.cross_entropy(head(pooled), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: value.detach().clone() for key, value in model.eval().state_dict().items()}
