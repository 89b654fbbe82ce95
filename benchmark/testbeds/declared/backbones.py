"""What a declared testbed runs: a public model as unit features, whatever library it came from.

``open_backbone(place, ...)`` tells by the folder which kind it is:

| folder | State (in-memory names) | features |
|---|---|---|
| transformers CLIP, image part only or whole | ``CLIPVisionModelWithProjection`` | projected |
| transformers image model (ViT, DINOv2, ConvNeXt, ...) | without its classifier | ``pooling`` |
| transformers text encoder (BERT, RoBERTa, MPNet, ...) | without its classifier | ``pooling`` |
| transformers causal language model (Llama, GPT-2, ...) | without its head | ``pooling`` |
| open_clip | ``model.visual`` | projected |

A subclass brings ``_run`` and ``prepare``; the rest is shared. To make one by hand (a base from
another source), build :class:`ImageBackbone` or :class:`TextBackbone` directly.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from benchmark.core.state import State, compatible
from benchmark.testbeds.declared.pixels import Pixels
from benchmark.testbeds.padding import chunks

Pooling = Literal["class", "mean", "last", "pooler", "auto"]
#: Texts → (n, d) embeddings in the space of the image features.
Embed = Callable[[Sequence[str]], Tensor]

# Elements of input per forward pass: on a CPU core the activations of so many rows stay in cache
# (64 texts of 32 tokens; 64 images of 64 × 64 pixels).
_PIXELS = {"cpu": 2**18, "cuda": 2**25}
_TOKENS = {"cpu": 2**11, "cuda": 2**16}


@dataclass(frozen=True, eq=False)
class Backbone(ABC):
    """A public model without its classifier.

    ``module``: the architecture on the meta device, to which a State is lent one call at a time.
    ``constants``: buffers that the module needs and no file holds (position ids), by name.
    ``weights()``: the base's float32 tensors; ``read(source)``: those of another checkpoint of the
    same architecture. ``content``: sha256 of what determines base and inputs.
    """

    module: nn.Module
    weights: Callable[[], State]
    content: str
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    kind: ClassVar[Literal["image", "text"]]

    def base(self) -> State:
        """The base's State, float32 on the CPU. The caller may change the dict, not the tensors."""
        return dict(self.weights())

    def forward(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, d) unit features of ``inputs``, differentiable, in cache-sized chunks."""
        return nn.functional.normalize(self._run(state, inputs), dim=-1)

    def bare(self) -> Self:
        """The same without weights and texts: all that ``forward`` needs, and it pickles."""
        return replace(self, weights=dict)

    @abstractmethod
    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Images (PIL) or texts → input tensors by name, each (n, ...), on the CPU."""

    @abstractmethod
    def _run(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, d) features of any length."""

    @property
    def embed(self) -> Embed | None:
        """Texts → (n, d) in the space of the features, or None without a text tower."""
        return None

    def call(self, state: State, **inputs: Any) -> Any:
        """One call of ``module`` with the tensors of ``state``."""
        device = next(iter(state.values())).device
        return torch.func.functional_call(
            self.module, {**self._constants(device), **state}, kwargs=inputs
        )

    def initialise(self, rng: torch.Generator) -> State:
        """Weights N(0, 1/fan-in), embeddings N(0, 0.02²), zero biases, unit gains and scales."""
        out = {}
        for key, value in self.weights().items():
            if not value.is_floating_point():
                out[key] = value
            elif key.endswith(("bias", "running_mean")):
                out[key] = torch.zeros_like(value)
            elif value.ndim < 2:
                out[key] = torch.ones_like(value)
            else:
                std = 0.02 if "embed" in key else value[0].numel() ** -0.5
                out[key] = torch.randn(value.shape, generator=rng) * std
        return out

    def fits(self, state: State, what: str) -> State:
        """``state`` if it can stand in for the base. Raises CheckpointError otherwise."""
        compatible(state, self.weights(), what)
        return state

    @functools.cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of tensors that are no parameters (running statistics): never trained."""
        kept = self.module.state_dict().keys()
        return tuple(name for name, _ in self.module.named_buffers() if name in kept)

    def _constants(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._lent:
            self._lent[device] = {k: v.to(device) for k, v in self.constants.items()}
        return self._lent[device]

    @functools.cached_property
    def _lent(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}


# By name, and not as lambdas, so that backbones pickle.
def _as_it_is(output: Any) -> Tensor:
    return output


def _no_tokens(texts: Sequence[str]) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, eq=False)
class ImageBackbone(Backbone):
    """Inputs: ``pixel_values`` (n, 3, side, side), uint8 as prepared, or float already normalised.

    ``argument``: the module's name for them; ``extra``: further arguments of every call;
    ``pool(output)``: what the module returns → (n, d). ``texts``: the text tower's embedding.
    """

    pixels: Pixels = field(default_factory=Pixels)
    pool: Callable[[Any], Tensor] = _as_it_is
    argument: str = "pixel_values"
    extra: Mapping[str, Any] = field(default_factory=dict)
    texts: Embed | None = None
    kind: ClassVar[Literal["image"]] = "image"

    @property
    def embed(self) -> Embed | None:
        return self.texts

    def bare(self) -> Self:
        return replace(super().bare(), texts=None)

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels.prepare(rows)}

    def _run(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        images = inputs["pixel_values"]
        size = (
            max(4, _PIXELS.get(images.device.type, 2**18) // max(images[0, 0].numel(), 1))
            if len(images)
            else 1
        )
        parts = []
        for chunk in images.split(size):
            argument = {self.argument: self.pixels.normalised(chunk)}
            parts.append(self.pool(self.call(state, **argument, **self.extra)))
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class TextBackbone(Backbone):
    """Inputs: ``input_ids`` and ``attention_mask``, (n, tokens) int64, padded on the right.

    ``tokenize(texts)`` makes them. Its own ``embed`` is the base, so label names make heads.
    """

    tokenize: Callable[[Sequence[str]], dict[str, Tensor]] = _no_tokens
    pooling: Pooling = "mean"
    extra: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[Literal["text"]] = "text"

    @property
    def embed(self) -> Embed:
        @torch.no_grad()
        def embed(texts: Sequence[str]) -> Tensor:
            return self.forward(self.base(), self.prepare(texts))

        return embed

    def bare(self) -> Self:
        return replace(super().bare(), tokenize=_no_tokens)

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return self.tokenize([str(row) for row in rows])

    def _run(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        ids, mask = inputs["input_ids"].long(), inputs["attention_mask"].long()
        found, back = chunks(mask, token_rows(ids))
        parts = []
        for part in found:
            seen = mask[part.rows, : part.width]
            chunk = ids[part.rows, : part.width]
            output = self.call(state, input_ids=chunk, attention_mask=seen, **self.extra)
            parts.append(pooled_text(output, seen, self.pooling))
        return torch.cat(parts)[back]


def token_rows(ids: Tensor) -> int:
    """Rows of ``ids`` (n, L) per forward pass."""
    return max(4, _TOKENS.get(ids.device.type, 2**11) // ids.shape[1])


def pooled_text(output: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    """(n, d): the mean over seen tokens, the first or last of them, or the model's own pooler."""
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state
    if pooling == "class":
        return hidden[:, 0]
    if pooling == "last":
        last = mask.sum(1).clamp(min=1) - 1
        return hidden[torch.arange(len(hidden), device=last.device), last]
    return (hidden * mask[:, :, None]).sum(1)  # the mean's divisor does not survive normalisation


def pooled_image(output: Any, pooling: Pooling) -> Tensor:
    """(n, d): the class token, the mean over tokens or positions, or the model's own pooler."""
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state
    if pooling == "class":
        return hidden[:, 0]
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
