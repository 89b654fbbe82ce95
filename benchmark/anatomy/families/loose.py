"""MLPs that stand by themselves: between a tower that sees and one that writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from benchmark.anatomy.blocks import Linear, MLPBlock, Slot


class Loose(NamedTuple):
    """Names of the layers below a module of one of ``classes``; its activation, or the field of the
    configuration that has it."""

    classes: tuple[str, ...]
    up: str
    down: str
    activation: str


LOOSE: tuple[Loose, ...] = (
    Loose(
        (
            "LlavaMultiModalProjector",
            "LlavaNextMultiModalProjector",
            "LlavaNextVideoMultiModalProjector",
            "LlavaOnevisionMultiModalProjector",
        ),
        up="linear_1",
        down="linear_2",
        activation="projector_hidden_act",
    ),
    # Of the text, beside that of the queries.
    Loose(
        ("Blip2QFormerLayer", "InstructBlipQFormerLayer", "InstructBlipVideoQFormerLayer"),
        up="intermediate.dense",
        down="output.dense",
        activation="hidden_act",
    ),
    # Of a language, behind the layers of an encoder of sound.
    Loose(
        tuple(
            f"{name}AttnAdapterLayer"
            for name in ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat")
        ),
        up="linear_1",
        down="linear_2",
        activation="relu",
    ),
    # Of what stands between two places of a window.
    Loose(
        ("Swinv2SelfAttention",),
        up="continuous_position_bias_mlp.0",
        down="continuous_position_bias_mlp.2",
        activation="relu",
    ),
)


def loose(model: nn.Module) -> Iterator[MLPBlock]:
    """Those of ``model``."""
    state = model.state_dict()
    for name, module in model.named_modules():
        for row in LOOSE:
            prefix = f"{name}." if name else ""
            if type(module).__name__ not in row.classes or f"{prefix}{row.up}.weight" not in state:
                continue

            def linear(part: str, prefix: str = prefix) -> Linear:
                weight, bias = (f"{prefix}{part}.{kind}" for kind in ("weight", "bias"))
                return Linear(Slot(weight), Slot(bias) if bias in state else None)

            config = getattr(module, "config", getattr(model, "config", None))
            activation = getattr(config, row.activation, row.activation)
            yield MLPBlock(up=linear(row.up), down=linear(row.down), activation=activation)
