"""Tiny random models with a synthetic task, without any download: what methods are checked on.

The weights are ten times larger than usual and no bias is zero, so that a transform that breaks the
function shows in the logits; head_dim / width = 1/8 as in real models.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Card, Testbed
from benchmark.api.recipe import Recipe
from benchmark.core.data import IGNORED, Split, Task
from benchmark.core.state import State

#: Every architecture that methods are checked on; to add one, name it here and in :func:`_module`.
Architecture = Literal["vit", "bert", "llama", "resnet"]
#: What every method is checked on. A method may take attention for granted, so a ResNet is not
#: among them; tests/test_conv_anatomy.py runs those that work on channels on it.
ARCHITECTURES: tuple[Architecture, ...] = ("vit", "bert", "llama")

_WIDTH, _HEADS, _LAYERS, _HIDDEN = 32, 8, 2, 48
_CLASSES, _SIZES = 3, {"train": 36, "validation": 18, "test": 24}
_SIDE, _VOCABULARY, _LENGTH = 8, 40, 6
_SCALE = 10.0
_SHAPE = {
    "hidden_size": _WIDTH,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _LAYERS,
    "intermediate_size": _HIDDEN,
}


@dataclass(frozen=True)
class Tiny(Testbed):
    """A model of 2 layers (or stages) and width 32 with three three-class tasks.

    ``tokens``: answers are so many words of a vocabulary (up to: every class has another length),
    read along where labels are given; of "llama" alone. 0: an answer is one class.
    """

    architecture: Architecture = "vit"
    tokens: int = 0

    card: ClassVar[Card] = Card("tiny random model with a synthetic task, for conformance checks")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("first", "second", "third")

    @property
    def recipe(self) -> Recipe:
        return Recipe(steps=4, batch_size=12, learning_rate=5e-3, warmup=1, frozen=self._embeddings)

    @property
    def _embeddings(self) -> tuple[str, ...]:
        return {"llama": ("embed_tokens.",), "resnet": ("embedder.",)}.get(
            self.architecture, ("embeddings.",)
        )

    def content_hash(self) -> str:
        return hashlib.sha256(f"tiny 3 {self.architecture} {self.tokens}".encode()).hexdigest()

    def base(self) -> State:
        return {key: value.clone() for key, value in _base(self).items()}

    def module(self) -> torch.nn.Module:
        return _module(self.architecture)

    def anatomy(self) -> Anatomy:
        return _anatomy(self.architecture)

    def initialise(self, rng: torch.Generator) -> State:
        out = {}
        for key, value in self.module().state_dict().items():
            gain = value.ndim == 1 and "norm" in key.lower() and key.endswith("weight")
            noise = torch.randn(value.shape, generator=rng)
            if not value.is_floating_point():
                out[key] = value.clone()
            elif key.endswith("running_var"):
                out[key] = 1 + 0.1 * noise.abs()
            else:
                out[key] = 1 + 0.1 * noise if gain else 0.2 * noise
        return out

    def task(self, name: str) -> Task:
        """Examples are noisy copies of one prototype per class. Shares no memory between calls."""
        return copy.deepcopy(_task(self, name))

    def draw(self, name: str) -> Task:
        """What :meth:`task` hands out copies of."""
        rng = torch.Generator().manual_seed(100 + self.tasks.index(name))
        prototypes = self._examples(_CLASSES, rng)
        splits = {part: self._split(prototypes, size, rng) for part, size in _SIZES.items()}
        head = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=rng))[0]
        if self.tokens:
            splits = {part: self._answered(split) for part, split in splits.items()}
            return Task(name, ("vocabulary",), **splits, head=head.contiguous(), scale=_SCALE)
        head = head[:_CLASSES]
        classes = tuple(f"class {i}" for i in range(_CLASSES))
        return Task(name, classes, **splits, head=head.contiguous(), scale=_SCALE)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the last hidden states over positions as a unit vector, (n, 32) float32;
        those at each place where a word of an answer is asked for, (n, 32) or (n, T, 32)."""
        arguments: dict[str, Any] = {key: inputs[key] for key in inputs if key != "places"}
        if "pixel_values" in inputs:
            # A half-precision State wants half-precision images; autocast would do it otherwise.
            arguments["pixel_values"] = inputs["pixel_values"].to(next(iter(state.values())).dtype)
        else:
            ids = inputs["input_ids"]
            # Given here because the skeleton's own buffers stay on the CPU.
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
            if self.architecture == "bert":
                arguments["token_type_ids"] = torch.zeros_like(ids)
            else:
                arguments["use_cache"] = False
        output = torch.func.functional_call(self.module(), state, kwargs=arguments)
        hidden = output.last_hidden_state.float()
        if hidden.ndim == 4:  # (n, channels, height, width)
            hidden = hidden.flatten(2).mT
        if "places" in inputs:
            places = inputs["places"]
            wanted = places.reshape(len(places), -1, 1).expand(-1, -1, _WIDTH)
            pooled = hidden.gather(1, wanted).reshape(*places.shape, _WIDTH)
        else:
            pooled = hidden.mean(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    def _examples(self, n: int, rng: torch.Generator) -> Tensor:
        if self.architecture in ("vit", "resnet"):
            return torch.randn(n, 3, _SIDE, _SIDE, generator=rng)
        return torch.randint(4, _VOCABULARY, (n, _LENGTH), generator=rng)

    def _split(self, prototypes: Tensor, n: int, rng: torch.Generator) -> Split:
        labels = torch.arange(n) % _CLASSES
        clean, other = prototypes[labels], self._examples(n, rng)
        if self.architecture in ("vit", "resnet"):
            return Split({"pixel_values": clean + 0.5 * other}, labels)
        kept = torch.rand(n, _LENGTH, generator=rng) < 0.7
        return Split({"input_ids": torch.where(kept, clean, other)}, labels)

    def _answered(self, split: Split) -> Split:
        """Class c becomes an answer of its own, of ``tokens`` words or one fewer."""
        asked, classes = split.inputs["input_ids"], split.labels
        words = 7 + 3 * classes[:, None] + torch.arange(self.tokens)
        short = (torch.arange(self.tokens) == self.tokens - 1) & (classes[:, None] % 2 == 1)
        last = torch.full((len(asked),), _LENGTH - 1)
        read = torch.cat([asked, words[:, :-1]], 1)
        places = last[:, None] + torch.arange(self.tokens)
        return Split(
            {"input_ids": asked, "places": last},
            words.masked_fill(short, IGNORED),
            {"input_ids": read, "places": places},
        )


@dataclass(frozen=True)
class Watched(Tiny):
    """A testbed that keeps a list of the tasks it was ``asked`` for."""

    asked: list[str] = field(default_factory=list, compare=False)

    def task(self, name: str) -> Task:
        self.asked.append(name)
        return super().task(name)


def tiny_sources() -> tuple[str, ...]:
    """The modules of Python that the tiny architectures are written in."""
    used = {type(m).__module__ for name in get_args(Architecture) for m in _module(name).modules()}
    return tuple(sorted(used))


def renew_modules() -> None:
    """Forget the modules that testbeds hand out, which a method may have spoiled."""
    _module.cache_clear()


@functools.cache
def _base(testbed: Tiny) -> State:
    return testbed.initialise(torch.Generator().manual_seed(0))


@functools.cache
def _task(testbed: Tiny, name: str) -> Task:
    return testbed.draw(name)


@functools.cache
def _anatomy(architecture: Architecture) -> Anatomy:
    return Anatomy.of(_module(architecture))


@functools.cache
def _module(architecture: Architecture) -> torch.nn.Module:
    """The architecture; its own weights are never used, States are lent to it."""
    import transformers

    model: torch.nn.Module
    # Building a model draws weights from the global generator, which is not ours to move.
    with torch.random.fork_rng(devices=[]):
        if architecture == "vit":
            vit = transformers.ViTConfig(image_size=_SIDE, patch_size=4, **_SHAPE)
            model = transformers.ViTModel(vit, add_pooling_layer=False)
        elif architecture == "resnet":
            resnet = transformers.ResNetConfig(
                embedding_size=_WIDTH // 2,
                hidden_sizes=[_WIDTH // 2, _WIDTH],
                depths=[1, 1],
                layer_type="basic",
            )
            model = transformers.ResNetModel(resnet)
        elif architecture == "bert":
            bert = transformers.BertConfig(
                vocab_size=_VOCABULARY, max_position_embeddings=_LENGTH, **_SHAPE
            )
            model = transformers.BertModel(bert, add_pooling_layer=False)
        else:
            llama = transformers.LlamaConfig(
                vocab_size=_VOCABULARY,
                num_key_value_heads=_HEADS // 2,
                max_position_embeddings=64,
                **_SHAPE,
            )
            model = transformers.LlamaModel(llama)
    return model.eval().requires_grad_(False)
