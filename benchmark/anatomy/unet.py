"""The UNets of diffusers: where their channels lie, and which groups of norms bind them.

Channels are those of each stretch of the residual stream (a new one behind every convolution that
writes it alone: the first, shortcuts, samplers), those between the two convolutions of a block,
those between the projections of a transformer, and those of the embedding of time that all blocks
read. In the way up a stretch stands beside a skip, so that it is a part of the columns of what
reads it, and of a norm whose groups may cross the border (:mod:`.nest`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from benchmark.anatomy.blocks import Axis, Channels, Slot
from benchmark.anatomy.nest import Nest, Part
from benchmark.core.errors import UsageError

CLASSES = ("UNet2DModel", "UNet2DConditionModel")
_BLOCKS = (
    "DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn", "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D",
)  # fmt: skip
#: What stands side by side in front of a layer: the names of the channels and how many they are.
_Side = tuple[tuple[str, int], ...]


def unets(model: nn.Module) -> list[tuple[str, list[Channels]]]:
    """Every UNet in ``model``: its prefix and its channels.

    Raises:
        UsageError: a block, norm or sampler of a UNet is of a kind that was not checked.
    """
    state = model.state_dict()
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ in CLASSES:
            prefix = f"{name}." if name else ""
            found.append((prefix, _UNet(module, prefix, state).channels()))
    return found


class _UNet:
    """Walks through one UNet as its forward pass does, and writes down what lies where."""

    def __init__(self, module: nn.Module, prefix: str, state: Mapping[str, Tensor]) -> None:
        self.module, self.prefix, self.state = module, prefix, state
        self._axes: defaultdict[str, list[Axis]] = defaultdict(list)
        self._parts: defaultdict[str, list[Part]] = defaultdict(list)
        self._widths: dict[str, int] = {}

    def channels(self) -> list[Channels]:
        self._made("conv_in")
        stream, skips = "conv_in", ["conv_in"]
        for name, block in self._below("down_blocks"):
            for resnet, attention in self._layers(name, block):
                stream = self._attended(attention, self._resnet(resnet, (stream,)))
                skips.append(stream)
            if (sampler := self._sampler(name, "downsamplers", stream)) is not None:
                stream = sampler
                skips.append(stream)
        stream = self._middle(stream)
        for name, block in self._below("up_blocks"):
            for resnet, attention in self._layers(name, block):
                stream = self._attended(attention, self._resnet(resnet, (stream, skips.pop())))
            stream = self._sampler(name, "upsamplers", stream) or stream
        self._norm("conv_norm_out", self._side((stream,)))
        self._read("conv_out", self._side((stream,)))
        self._time()
        return [
            Channels(f"{self.prefix}{name}", tuple(axes), nest=self._nest(name))
            for name, axes in self._axes.items()
        ]

    def _nest(self, name: str) -> Nest | None:
        return Nest.of(self._widths[name], self._parts[name])

    def _middle(self, stream: str) -> str:
        block = getattr(self.module, "mid_block", None)
        if block is None:
            return stream
        self._check("mid_block", block)
        stream = self._resnet("mid_block.resnets.0", (stream,))
        for number, attention in enumerate(block.attentions):
            if attention is not None:
                stream = self._attended(f"mid_block.attentions.{number}", stream)
            stream = self._resnet(f"mid_block.resnets.{number + 1}", (stream,))
        return stream

    def _layers(self, name: str, block: nn.Module) -> Iterator[tuple[str, str | None]]:
        self._check(name, block)
        attends = len(getattr(block, "attentions", ()))
        for number, _ in enumerate(block.get_submodule("resnets").children()):
            attention = f"{name}.attentions.{number}" if attends else None
            yield f"{name}.resnets.{number}", attention

    def _resnet(self, name: str, streams: tuple[str, ...]) -> str:
        """norm1 → conv1 (+ time) → norm2 → conv2, beside them a shortcut: the stream behind."""
        module = self.module.get_submodule(name)
        self._is(name, "ResnetBlock2D")
        side, inner = self._side(streams), f"{name}.conv1"
        self._norm(f"{name}.norm1", side)
        self._read(inner, side)
        self._made(inner)
        width = self._widths[inner]
        if self._has(f"{name}.time_emb_proj"):
            self._read(f"{name}.time_emb_proj", (("time", self._columns(f"{name}.time_emb_proj")),))
            halves = 2 if getattr(module, "time_embedding_norm", "") == "scale_shift" else 1
            for start in range(0, halves * width, width):
                self._rows(f"{name}.time_emb_proj", inner, (start, start + width))
        own = ((inner, width),)
        self._norm(f"{name}.norm2", own)
        self._read(f"{name}.conv2", own)
        if self._has(f"{name}.conv_shortcut"):
            self._read(f"{name}.conv_shortcut", side)
            self._made(f"{name}.conv_shortcut")
            stream = f"{name}.conv_shortcut"
        elif len(streams) > 1:
            raise UsageError(f"{self.prefix}{name} adds to a stream and its skip; not supported")
        else:
            (stream,) = streams
        self._rows(f"{name}.conv2", stream)
        return stream

    def _attended(self, name: str | None, stream: str) -> str:
        if name is None:
            return stream
        side = self._side((stream,))
        module = self.module.get_submodule(name)
        if type(module).__name__ == "Attention":
            if getattr(module, "group_norm", None) is not None:
                self._norm(f"{name}.group_norm", side)
            for part in ("to_q", "to_k", "to_v"):
                self._read(f"{name}.{part}", side, mixed=True)
            self._rows(f"{name}.to_out.0", stream, mixed=True)
            return stream
        self._is(name, "Transformer2DModel")
        self._norm(f"{name}.norm", side)
        self._read(f"{name}.proj_in", side)
        self._made(f"{name}.proj_in")
        inner = f"{name}.proj_in"
        for number, block in enumerate(module.get_submodule("transformer_blocks").children()):
            self._transformer(f"{name}.transformer_blocks.{number}", block, inner)
        self._read(f"{name}.proj_out", self._side((inner,)))
        self._rows(f"{name}.proj_out", stream)
        return stream

    def _transformer(self, name: str, block: nn.Module, inner: str) -> None:
        self._is(name, "BasicTransformerBlock")
        side = self._side((inner,))
        for number in (1, 2, 3):
            if (norm := getattr(block, f"norm{number}", None)) is None:
                continue
            if not isinstance(norm, nn.LayerNorm):
                raise UsageError(f"{self.prefix}{name}.norm{number} is no LayerNorm; not supported")
            self._rows(f"{name}.norm{number}", inner)
        for attention, crossing in (("attn1", ()), ("attn2", ("to_k", "to_v"))):
            own = block.get_parameter(f"{attention}.to_k.weight").shape[1]
            text = crossing if getattr(block, attention).is_cross_attention else ()
            assert text or own == self._widths[inner]
            for part in ("to_q", "to_k", "to_v"):
                if part not in text:
                    self._read(f"{name}.{attention}.{part}", side, mixed=True)
            self._rows(f"{name}.{attention}.to_out.0", inner, mixed=True)
        self._read(f"{name}.ff.net.0.proj", side)
        self._rows(f"{name}.ff.net.2", inner)

    def _sampler(self, name: str, kind: str, stream: str) -> str | None:
        samplers = getattr(self.module.get_submodule(name), kind, None)
        if samplers is None:
            return None
        conv = f"{name}.{kind}.0.conv"
        if len(samplers) > 1 or not self._has(conv):
            raise UsageError(f"{self.prefix}{name}.{kind} is not one convolution; not supported")
        self._read(conv, self._side((stream,)))
        self._made(conv)
        return conv

    def _time(self) -> None:
        """What writes the embedding of time; given from outside in part, it stays as it is."""
        if "time" not in self._axes:
            return
        known = True
        for name in ("time_embedding", "class_embedding", "add_embedding"):
            module = getattr(self.module, name, None)
            if isinstance(module, nn.Embedding):
                self._axes["time"].append(Axis(Slot(f"{self.prefix}{name}.weight"), 1))
            elif type(module).__name__ == "TimestepEmbedding":
                self._rows(f"{name}.linear_2", "time")
            elif module is not None:
                known = False
        if not known or getattr(self.module, "encoder_hid_proj", None) is not None:
            del self._axes["time"]

    def _below(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        for number, block in enumerate(self.module.get_submodule(name).children()):
            yield f"{name}.{number}", block

    def _check(self, name: str, block: nn.Module) -> None:
        if type(block).__name__ not in _BLOCKS:
            self._is(name, " or ".join(_BLOCKS))

    def _is(self, name: str, wanted: str) -> None:
        found = type(self.module.get_submodule(name)).__name__
        if found != wanted:
            raise UsageError(
                f"{self.prefix}{name} is a {found}, and no {wanted}, of which "
                "benchmark/anatomy/unet.py knows where the channels lie"
            )

    def _has(self, name: str) -> bool:
        return f"{self.prefix}{name}.weight" in self.state

    def _columns(self, name: str) -> int:
        return self.state[f"{self.prefix}{name}.weight"].shape[1]

    def _side(self, streams: Sequence[str]) -> _Side:
        return tuple((stream, self._widths[stream]) for stream in streams)

    def _made(self, name: str) -> None:
        """New channels, which a layer makes."""
        self._widths[name] = len(self.state[f"{self.prefix}{name}.weight"])
        self._rows(name, name)

    def _rows(
        self, name: str, units: str, rows: tuple[int, int] | None = None, mixed: bool = False
    ) -> None:
        """Weight and bias of a layer that writes the channels, or of a norm over them."""
        for part in ("weight", "bias"):
            if (key := f"{self.prefix}{name}.{part}") in self.state:
                matrix = self.state[key].ndim > 1
                self._axes[units].append(Axis(Slot(key, rows), 0, mixed=mixed and matrix))

    def _read(self, name: str, side: _Side, mixed: bool = False) -> None:
        """The columns of a layer that reads channels, side by side."""
        key, start = f"{self.prefix}{name}.weight", 0
        total = sum(width for _, width in side)
        if self.state[key].shape[1] != total:
            raise UsageError(f"{key!r} reads {self.state[key].shape[1]} of {total} channels")
        for units, width in side:
            self._widths.setdefault(units, width)
            columns = None if len(side) == 1 else (start, start + width)
            self._axes[units].append(Axis(Slot(key, columns=columns), 1, mixed=mixed))
            start += width

    def _norm(self, name: str, side: _Side) -> None:
        """A GroupNorm over channels side by side: its gains, and the groups that bind them."""
        norm = self.module.get_submodule(name)
        if not isinstance(norm, nn.GroupNorm):
            raise UsageError(f"{self.prefix}{name} is no GroupNorm; not supported")
        size, start = norm.num_channels // norm.num_groups, 0
        for units, width in side:
            stop = start + width
            self._rows(name, units, None if len(side) == 1 else (start, stop))
            for group in range(start // size, -(-stop // size)):
                low, high = max(start, group * size), min(stop, (group + 1) * size)
                whole = "" if high - low == size else f", part {low - group * size}"
                part = (low - start, high - start, f"{name}{whole}")
                self._parts[units].append(part)
            start = stop
