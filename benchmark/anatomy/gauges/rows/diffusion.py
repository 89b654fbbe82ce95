"""Norms, modulations and gates of image generators by diffusers.

    adaLN   x̂·(1 + s) + t,  x + g ⊙ branch(…);   s, t, g = chunks of W·silu(time, text) + b

so the rows of W and b that make s (b with its 1), and those that make t, are scaled together, as
gain and bias of a norm are; those that make g as a layer scale is. Channels of UNets trade places
as :mod:`benchmark.anatomy.unet` has them; before a norm over groups of them each group has a scale.
Axes of transformers: :mod:`.modulated`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from benchmark.anatomy.blocks import AttentionBlock, Channels, Linear, MLPBlock, Slot
from benchmark.anatomy.gauges.rows.modulated import modulated
from benchmark.anatomy.gauges.rows.names import Names, wholes
from benchmark.anatomy.gauges.wiring import InstanceNorm, Norm, Segment, Shifted, Stream, Writer
from benchmark.anatomy.whole import Anatomy

_BETWEEN = re.compile(r"(.*\.resnets\.\d+)\.conv1")
_PROJECTED = re.compile(r"(.*attentions\.\d+)\.proj_in\.weight")
_ROOT = re.compile(r"((?:.*\.)?)transformer_blocks\.0\..*")


class Generators(NamedTuple):
    """What norms and modulations give; groups of channels before a norm; axes of transformers; what
    no row says."""

    streams: tuple[Stream, ...] = ()
    norms: tuple[InstanceNorm, ...] = ()
    channels: tuple[Channels, ...] = ()
    unsaid: tuple[str, ...] = ()


def generators(names: Names, anatomy: Anatomy) -> Generators:
    """Those of every generator of images in the model."""
    state, wires = names.state, _Wires(names.state, anatomy.mlp)
    roots = dict[str, None]()
    for block, row in zip(anatomy.attention, anatomy.rows, strict=False):
        key = block.q.weight.key
        layer, _, attention = key.removesuffix(".to_q.weight").rpartition(".")
        if row == "diffusers-attention":
            wires.normed(f"{layer}.{attention}.group_norm", wholes(block.q, block.k, block.v))
        elif row == "flux-single":
            wires.single(layer, block)
        elif row.startswith(("diffusers-", "mmdit", "flux")):
            wires.layer(layer, attention, block)
            if (first := _ROOT.fullmatch(key)) and "attentions." not in first[1]:
                roots[first[1]] = None
        if block.qk_norm is not None and row.startswith(("diffusers-", "mmdit", "flux")):
            added = tuple(Slot(f"{layer}.{attention}.norm_added_{side}.weight") for side in "qk")
            further = (added,) if block.joint is not None else ()
            names.qk_gains.append((block, (block.qk_norm, *further)))
    for key in state:
        if projected := _PROJECTED.fullmatch(key):
            wires.normed(f"{projected[1]}.norm", (wires.linear(f"{projected[1]}.proj_in"),))
    channels, unsaid = list[Channels](), list[str]()
    for root in roots:
        wires.end(root)
        found, strange = modulated(root, state)
        if strange:
            unsaid.append(
                f"gauges of the streams of {root or 'the model'}: no row knows {strange!r}"
            )
        else:
            channels += found
    norms = tuple(_grouped(anatomy.channels, state))
    return Generators(tuple(wires.streams), norms, tuple(channels), tuple(unsaid))


def _grouped(channels: Sequence[Channels], state: Mapping[str, Tensor]) -> Iterator[InstanceNorm]:
    """The channels between the convolutions of a UNet's blocks."""
    for units in channels:
        if found := _BETWEEN.fullmatch(units.name):
            conv, width = Linear.named(units.name, state), units.width(state)
            time = Linear.named(f"{found[1]}.time_emb_proj", state)
            # Else time is added behind the norm.
            before = time.weight.key in state and len(time.weight.read(state)) == width
            also = (*tuple(conv.slots())[1:], *(time.slots() if before else ()))
            groups = len(units.nest.inner) if units.nest is not None else 1
            norm = f"{found[1]}.norm2"
            yield InstanceNorm(norm, conv, Slot(f"{norm}.weight"), groups, also)


class _Wires:
    """The streams of single norms, modulations and gates, written down layer by layer."""

    def __init__(self, state: Mapping[str, Tensor], mlps: Sequence[MLPBlock]) -> None:
        self.state, self.streams = state, list[Stream]()
        self._mlps = {mlp.up.weight.key: mlp for mlp in mlps}

    def linear(self, name: str) -> Linear:
        return Linear.named(name, self.state)

    def normed(self, name: str, readers: tuple[Linear, ...], centred: bool = False) -> None:
        """A norm of one gain per channel, if there is one, and all that reads it."""
        width = readers[0].weight.read(self.state).shape[1]
        if f"{name}.weight" not in self.state:  # they read the channels themselves
            self.streams.append(
                Stream(name, (Segment(name, width, readers=readers),), renamed=False)
            )
            return
        gain, bias = (f"{name}.{part}" for part in ("weight", "bias"))
        added = Slot(bias) if bias in self.state else None
        self._given(Norm(name, Slot(gain), added, centred), readers)

    def layer(self, name: str, attention: str, block: AttentionBlock) -> None:
        """One attention of a layer, and with the first of it the MLPs."""
        modulation = f"{name}.norm1.linear"
        mlp = self._mlps.get(f"{name}.ff.net.0.proj.weight")
        own = wholes(block.q, block.k, block.v)
        if f"{modulation}.weight" not in self.state:
            if attention == "attn1":
                self.normed(f"{name}.norm1", own, centred=True)
            else:
                self.normed(f"{name}.norm2", wholes(block.q), centred=True)
            if mlp is not None and attention == "attn1":
                self.normed(f"{name}.norm3", wholes(mlp.up, mlp.gate), centred=True)
            return
        if attention == "attn2":
            self._modulated(modulation, 6, own)
            self._gated(modulation, 8, block.o)
            return
        self._branches(modulation, own, block.o, mlp)
        if block.joint is not None:
            context = f"{name}.norm1_context.linear"
            readers = wholes(block.joint.q, block.joint.k, block.joint.v)
            if block.joint.o is None:  # the last layer's, which the text does not leave
                self._modulated(context, 1, readers, gain=0)
            else:
                second = self._mlps.get(f"{name}.ff_context.net.0.proj.weight")
                self._branches(context, readers, block.joint.o, second)

    def single(self, name: str, block: AttentionBlock) -> None:
        """Flux's layer of attention and MLP side by side: one norm, one gate for both."""
        modulation = f"{name}.norm.linear"
        readers = (*wholes(block.q, block.k, block.v), self.linear(f"{name}.proj_mlp"))
        self._modulated(modulation, 0, readers)
        self._gated(modulation, 2, self.linear(f"{name}.proj_out"))

    def end(self, root: str) -> None:
        """The modulation behind the last layer."""
        for modulation, reader, at in (
            ("norm_out.linear", "proj_out", 1),
            ("proj_out_1", "proj_out_2", 0),
        ):
            if (
                f"{root}{modulation}.weight" in self.state
                and f"{root}{reader}.weight" in self.state
            ):
                self._modulated(root + modulation, at, (self.linear(root + reader),), gain=1 - at)

    def _branches(
        self, modulation: str, readers: tuple[Linear, ...], o: Linear, mlp: MLPBlock | None
    ) -> None:
        """Shift, gain and gate of attention, then of the MLP."""
        self._modulated(modulation, 0, readers)
        self._gated(modulation, 2, o)
        if mlp is not None:
            self._modulated(modulation, 3, wholes(mlp.up, mlp.gate))
            self._gated(modulation, 5, mlp.down)

    def _modulated(
        self, name: str, shift: int, readers: tuple[Linear, ...], gain: int | None = None
    ) -> None:
        """A norm whose bias is one chunk of a modulation, and its gain the next or ``gain``."""
        width = readers[0].weight.read(self.state).shape[1]
        made = self._chunk(name, shift + 1 if gain is None else gain, width)
        added = self._chunk(name, shift, width)
        if made.bias is not None and added.bias is not None:
            constant = Shifted(made.bias.key, made.bias.rows)
            also = (made.weight, added.weight)
            self._given(Norm(f"{name}[{shift}]", constant, added.bias, True, also), readers)

    def _gated(self, name: str, chunk: int, linear: Linear) -> None:
        width = len(linear.weight.read(self.state))
        writer = Writer(linear, gate=self._chunk(name, chunk, width))
        where = f"{name}[{chunk}]"
        self.streams.append(
            Stream(where, (Segment(where, width, writers=(writer,)),), renamed=False)
        )

    def _chunk(self, name: str, number: int, width: int) -> Linear:
        return Linear.named(name, self.state, (number * width, (number + 1) * width))

    def _given(self, norm: Norm, readers: tuple[Linear, ...]) -> None:
        width = len(norm.gain.read(self.state))
        segment = Segment(norm.name, width, sources=(norm,), readers=readers)
        self.streams.append(Stream(norm.name, (segment,), renamed=False))
