"""MLPs that stand by themselves: between a tower that sees and one that writes, or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from benchmark.anatomy.blocks import Linear, MLPBlock, Slot


class Loose(NamedTuple):
    """Names of the layers below a module of one of ``classes``; its activation, or the field of the
    configuration that has it."""

    classes: tuple[str, ...]
    up: str
    down: str
    activation: str
    gate: str = ""


#: Activations of diffusers' projections.
_ACTIVATIONS = {"GEGLU": "gelu", "SwiGLU": "silu", "ApproximateGELU": "quick_gelu"}
#: Mixtures: gates and ups are one tensor (experts, 2n, d), downs another (experts, d, n).
EXPERTS = ("MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts")

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
    # What every token goes through beside the experts, and the layers that have none.
    Loose(
        ("Qwen2MoeMLP", "Qwen3MoeMLP"),
        up="up_proj",
        gate="gate_proj",
        down="down_proj",
        activation="hidden_act",
    ),
    # Of the time and of a pooled text that a generator of images is given.
    Loose(
        ("TimestepEmbedding", "PixArtAlphaTextProjection"),
        up="linear_1",
        down="linear_2",
        activation="silu",
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
                return Linear.named(f"{prefix}{part}", state)

            config = getattr(module, "config", getattr(model, "config", None))
            activation = getattr(config, row.activation, row.activation)
            gate = linear(row.gate) if row.gate else None
            yield MLPBlock(linear(row.up), linear(row.down), gate, activation)
        if type(module).__name__ == "FeedForward" and f"{name}.net.0.proj.weight" in state:
            yield from _feed_forward(name, module, state)
        if type(module).__name__ in EXPERTS:
            yield from _experts(name, state, getattr(model, "config", None))


def _feed_forward(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[MLPBlock]:
    """That of diffusers: a projection with its activation, which may be gated in one tensor, the
    ups first; dropout; a projection."""
    entry = module.get_submodule("net.0")
    kind = type(entry).__name__
    activation = _ACTIVATIONS.get(kind, getattr(entry, "approximate", "none"))
    names = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    if kind not in (*_ACTIVATIONS, "GELU") or "net.2.weight" not in module.state_dict():
        return

    gate, up = None, Linear.named(f"{name}.net.0.proj", state)
    if kind in ("GEGLU", "SwiGLU"):
        width = len(state[up.weight.key]) // 2
        up, gate = (
            Linear.named(f"{name}.net.0.proj", state, (n * width, (n + 1) * width)) for n in (0, 1)
        )
    yield MLPBlock(
        up, Linear.named(f"{name}.net.2", state), gate, names.get(activation, activation)
    )


def _experts(name: str, state: Mapping[str, Tensor], config: object) -> Iterator[MLPBlock]:
    both, down = (f"{name}.{part}" for part in ("gate_up_proj", "down_proj"))
    experts, width = len(state[both]), state[both].shape[1] // 2
    for i in range(experts):
        gate, up = (Linear(Slot(both, rows, index=i)) for rows in ((0, width), (width, 2 * width)))
        act = getattr(config, "hidden_act", "silu")
        yield MLPBlock(up, Linear(Slot(down, index=i)), gate, act)
