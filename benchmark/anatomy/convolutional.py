"""ConvNeXt and ResNet: where their channels lie, one row of names per implementation.

ConvNeXt: the hidden units of each block's pointwise MLP, and the residual stream of each stage
(stem or downsampling, depthwise convolutions, norms, both ends of the MLPs, layer scales).
ConvNeXtV2's response norm has a gain per hidden unit and no activation of its own to replace, so
its MLPs are plain channels, as are those made of 1×1 convolutions.

ResNet: the channels between the convolutions of each block, and the residual stream between two
shortcut convolutions; batch norms with their running statistics go along. Between BatchNorm and
the next convolution stands a ReLU, so inner channels also have a free positive factor.

The stream of the last stage is what a bare model gives; it can be renamed only where the model
itself reads it (a classifier, CLIP's projection or attention pool).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from benchmark.anatomy.blocks import Channels, MLPBlock
from benchmark.anatomy.layout import Layout
from benchmark.core.errors import UsageError

Tower = tuple[str, list[MLPBlock], list[Channels]]


@dataclass(frozen=True)
class ConvNeXt:
    """Names below the tower; those of a block below ``block``, ``{}`` its stage and number.

    ``classes``: the towers whose forward pass was checked. ``last``: norms at the end.
    ``readers``: what may read the last stream, below the tower, or below the module that holds it
    where it starts with a dot.
    """

    name: str
    classes: tuple[str, ...]
    stem: tuple[str, str]
    block: str
    depthwise: str
    norm: str
    up: str
    down: str
    grn: str
    scale: str
    downsample: tuple[str, str]
    last: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def mark(self) -> str:
        """A weight that every tower has."""
        return f"{self.block.format(0, 0)}.{self.depthwise}.weight"

    def read(self, model: nn.Module, prefix: str) -> Tower:
        """The blocks of the tower at ``prefix``."""
        layout, stage = Layout(model.state_dict(), prefix), 0
        mlps: list[MLPBlock] = []
        layout.conv(self.stem[0], "stage0")
        layout.norm(self.stem[1], "stage0")
        while layout.has(f"{self.block.format(stage, 0)}.{self.depthwise}"):
            stream, number = f"stage{stage}", 0
            norm, conv = (name.format(stage) for name in self.downsample)
            if layout.has(conv):
                layout.norm(norm, f"stage{stage - 1}")
                layout.conv(conv, stream, f"stage{stage - 1}")
            elif stage:
                raise UsageError(f"{prefix}: a stage without downsampling is not supported")
            while layout.has((block := self.block.format(stage, number)) + f".{self.depthwise}"):
                mlps += self._block(model, layout, block, stream)
                number += 1
            stage += 1
        for name in self.last:
            layout.norm(name, stream)
        fixed = () if _read_by(layout, self.readers, stream) else (stream,)
        return f"convnext-{self.name}", mlps, layout.channels(fixed)

    def _block(
        self, model: nn.Module, layout: Layout, block: str, stream: str
    ) -> Iterator[MLPBlock]:
        layout.conv(f"{block}.{self.depthwise}", stream)
        layout.norm(f"{block}.{self.norm}", stream)
        layout.vector(f"{block}.{self.scale}", stream)
        up, down, grn = (f"{block}.{name}" for name in (self.up, self.down, self.grn))
        plain = layout.state[f"{layout.prefix}{up}.weight"].ndim == 2 and not layout.has(grn)
        if plain:
            gelu = any(isinstance(m, nn.GELU) for m in _module(model, layout, block).modules())
            config = getattr(model, "config", None)
            yield layout.mlp(
                up, down, stream, getattr(config, "hidden_act", "gelu" if gelu else "unknown")
            )
            return
        layout.conv(up, f"{block}.hidden", stream)
        layout.norm(grn, f"{block}.hidden")
        layout.conv(down, stream, f"{block}.hidden")


@dataclass(frozen=True)
class ResNet:
    """Names below the tower. ``stages``: number of the first, and of a stage's block, ``{}`` each.

    ``stem``: pairs of convolution and norm, as many as there are. ``convs``: those of a block below
    it, ``{}`` from ``first`` on; ``shortcuts``: pairs, of which a block has one or none.
    """

    name: str
    classes: tuple[str, ...]
    stem: tuple[tuple[str, str], ...]
    block: str
    convs: tuple[str, str]
    first: int
    shortcuts: tuple[tuple[str, str], ...]
    readers: tuple[str, ...]
    stage: int = 0

    @property
    def mark(self) -> str:
        return f"{self.block.format(self.stage, 0)}.{self.convs[0].format(self.first)}.weight"

    def read(self, model: nn.Module, prefix: str) -> Tower:
        """The blocks of the tower at ``prefix``."""
        layout = Layout(model.state_dict(), prefix)
        stream, relu = self._stem(layout), []
        stage = self.stage
        while layout.has(f"{self.block.format(stage, 0)}.{self.convs[0].format(self.first)}"):
            number = 0
            while layout.has(
                (block := self.block.format(stage, number)) + f".{self.convs[0].format(self.first)}"
            ):
                into, stream = stream, self._shortcut(layout, block, stream)
                inner = list(self._inner(layout, block, into, stream))
                if _only_relu(_module(model, layout, block)):
                    relu += inner
                number += 1
            stage += 1
        fixed = () if _read_by(layout, self.readers, stream) else (stream,)
        return f"resnet-{self.name}", [], layout.channels(fixed, relu)

    def _stem(self, layout: Layout) -> str:
        """What the first block reads. Its ReLUs scale nothing: pooling and shortcuts read it."""
        into: str | None = None
        for conv, norm in self.stem:
            if layout.has(conv):
                layout.conv(conv, conv, into)
                layout.batch_norm(norm, conv)
                into = conv
        if into is None:
            raise UsageError(f"{layout.prefix}: no stem convolution; it is not supported")
        return into

    def _shortcut(self, layout: Layout, block: str, into: str) -> str:
        """The stream after the block: a new one behind a shortcut convolution."""
        for conv, norm in self.shortcuts:
            if layout.has(f"{block}.{conv}") and layout.has(f"{block}.{norm}"):
                layout.conv(f"{block}.{conv}", block, into)
                layout.batch_norm(f"{block}.{norm}", block)
                return block
        return into

    def _inner(self, layout: Layout, block: str, into: str, stream: str) -> Iterator[str]:
        """The names of the channels between the block's convolutions."""
        number = self.first
        while True:
            conv, norm = (f"{block}.{name.format(number)}" for name in self.convs)
            last = not layout.has(f"{block}.{self.convs[0].format(number + 1)}")
            out = stream if last else conv
            layout.conv(conv, out, into, power=0 if number == self.first else -1)
            layout.batch_norm(norm, out, power=0 if last else 1)
            if last:
                return
            yield out
            into, number = out, number + 1


_HF = (".classifier", ".classifier.1")
_TIMM = (".head.proj", ".head.mlp.fc1")
_POOL = ("attnpool.q_proj", "attnpool.k_proj", "attnpool.v_proj")

ROWS: tuple[ConvNeXt | ResNet, ...] = (
    ConvNeXt(
        name="transformers",
        classes=("ConvNextModel", "ConvNextV2Model"),
        stem=("embeddings.patch_embeddings", "embeddings.layernorm"),
        block="encoder.stages.{}.layers.{}",
        depthwise="dwconv",
        norm="layernorm",
        up="pwconv1",
        down="pwconv2",
        grn="grn",
        scale="layer_scale_parameter",
        downsample=(
            "encoder.stages.{}.downsampling_layer.0",
            "encoder.stages.{}.downsampling_layer.1",
        ),
        last=("layernorm",),
        readers=_HF,
    ),
    ConvNeXt(
        name="timm",
        classes=("ConvNeXt",),
        stem=("stem.0", "stem.1"),
        block="stages.{}.blocks.{}",
        depthwise="conv_dw",
        norm="norm",
        up="mlp.fc1",
        down="mlp.fc2",
        grn="mlp.grn",
        scale="gamma",
        downsample=("stages.{}.downsample.0", "stages.{}.downsample.1"),
        last=("norm_pre", "head.norm"),
        readers=("head.fc", *_TIMM),
    ),
    ResNet(
        name="transformers",
        classes=("ResNetModel",),
        stem=(("embedder.embedder.convolution", "embedder.embedder.normalization"),),
        block="encoder.stages.{}.layers.{}",
        convs=("layer.{}.convolution", "layer.{}.normalization"),
        first=0,
        shortcuts=(("shortcut.convolution", "shortcut.normalization"),),
        readers=_HF,
    ),
    ResNet(
        name="timm",  # torchvision's too, and open_clip's ModifiedResNet with its attention pool
        classes=("ResNet", "ModifiedResNet"),
        stem=(
            *(("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")),
            *((f"conv{i}", f"bn{i}") for i in (1, 2, 3)),
        ),
        block="layer{}.{}",
        convs=("conv{}", "bn{}"),
        first=1,
        stage=1,
        shortcuts=(("downsample.0", "downsample.1"), ("downsample.1", "downsample.2")),
        readers=("fc", *_POOL, *_TIMM),
    ),
)


def towers(model: nn.Module) -> list[tuple[str, Tower]]:
    """Every convolutional tower of ``model``: its prefix; family, MLP blocks, channels.

    Raises:
        UsageError: a tower has the names of a row, but a class or tensors it does not answer for.
    """
    found = []
    for row in ROWS:
        pattern = re.compile(rf"((?:.*\.)?){re.escape(row.mark)}")
        for prefix in (m[1] for name in model.state_dict() if (m := pattern.fullmatch(name))):
            owner = type(model.get_submodule(prefix.rstrip("."))).__name__
            if owner not in row.classes:
                raise UsageError(
                    f"{prefix or type(model).__name__} has the tensor names of "
                    f"{type(row).__name__} ({row.name}), but its class {owner} is none of "
                    f"{', '.join(row.classes)}; check its forward pass and extend "
                    "benchmark/anatomy/convolutional.py"
                )
            found.append((prefix, row.read(model, prefix)))
    return found


def _read_by(layout: Layout, readers: tuple[str, ...], stream: str) -> bool:
    """Write down the layer that reads ``stream`` at the end; whether the model has one."""
    holder = layout.prefix.rstrip(".").rpartition(".")[0]
    above = f"{holder}." if holder else ""
    if any(key.startswith(f"{above}head.pool.") for key in layout.state) and above:
        return False  # an attention pool of timm stands between, whose channels are not followed
    found = False
    for name in readers:
        outside = name.startswith(".")
        if outside and not layout.prefix:
            continue
        key = f"{above}{name[1:]}" if outside else f"{layout.prefix}{name}"
        if f"{key}.weight" in layout.state:
            layout.reader(key, stream, mixed=name in _POOL)
            found = True
    if layout.has("attnpool.c_proj"):
        layout.conv("attnpool.c_proj", None)
        layout.vector("attnpool.positional_embedding", stream, dim=1)
    return found


def _module(model: nn.Module, layout: Layout, name: str) -> nn.Module:
    return model.get_submodule(f"{layout.prefix}{name}")


def _only_relu(block: nn.Module) -> bool:
    """Whether every activation of the block is a ReLU."""
    found = {type(m) for m in block.modules() if "activation" in type(m).__module__}
    return found == {nn.ReLU}
