"""The axes of transformers that time and text modulate: their streams, and the embedding of both.

What is added and multiplied per channel, and a LayerNorm without gains, know no order of channels.
In Flux text and image are one stream in the end. DiT's places are no tensors of a State, so that
its stream stays as it is; time is embedded in every layer by itself there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor

from benchmark.anatomy.blocks import Axis, Channels, Slot

#: Of each stream: what reads it, what writes it, and whether heads mix what lies across.
_Parts = tuple[tuple[str, str, bool], ...]
_MIXED = True
_IMAGE: _Parts = (
    *((f"{a}.to_{side}", "reads", _MIXED) for a in ("attn", "attn2") for side in "qkv"),
    *((f"{a}.to_out.0", "writes", _MIXED) for a in ("attn", "attn2")),
    ("ff.net.0.proj", "reads", False),
    ("ff.net.2", "writes", False),
)
_TEXT: _Parts = (
    *((f"attn.add_{side}_proj", "reads", _MIXED) for side in "qkv"),
    ("attn.to_add_out", "writes", _MIXED),
    ("ff_context.net.0.proj", "reads", False),
    ("ff_context.net.2", "writes", False),
)
_SINGLE: _Parts = (
    *((f"attn.to_{side}", "reads", _MIXED) for side in "qkv"),
    ("proj_mlp", "reads", False),
    ("proj_out", "writes", _MIXED),
)


def modulated(root: str, state: Mapping[str, Tensor]) -> tuple[list[Channels], str]:
    """The axes of the transformer below ``root``, and a tensor that is not known, if there is one.

    ``root``: what stands before ``transformer_blocks.0``.
    """
    walk = _Walk(root, state)
    if f"{root}transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.weight" in state:
        walk.dit()
        return walk.found("time"), ""
    flux = f"{root}x_embedder.weight" in state
    image, text = "image", "image" if flux else "text"
    walk.writes("x_embedder" if flux else "pos_embed.proj", image)
    walk.places("pos_embed.pos_embed", image)
    walk.writes("context_embedder", text)
    for part in ("timestep_embedder", "text_embedder", "guidance_embedder"):
        walk.writes(f"time_text_embed.{part}.linear_2", "time")
    for layer in walk.layers("transformer_blocks"):
        walk.modulation(f"{layer}.norm1.linear", image)
        walk.modulation(f"{layer}.norm1_context.linear", text)
        walk.parts(layer, _IMAGE, image)
        walk.parts(layer, _TEXT, text)
    for layer in walk.layers("single_transformer_blocks"):
        walk.modulation(f"{layer}.norm.linear", image)
        walk.parts(layer, _SINGLE, image)
    walk.modulation("norm_out.linear", image)
    walk.reads("proj_out", image)
    return walk.found(""), walk.strange()


class _Walk:
    """What lies along which axis."""

    def __init__(self, root: str, state: Mapping[str, Tensor]) -> None:
        self.root, self.state = root, state
        self._axes: defaultdict[str, list[Axis]] = defaultdict(list)
        self._seen = set[str]()

    def found(self, start: str) -> list[Channels]:
        named = ((name, axes) for name, axes in self._axes.items() if name.startswith(start))
        return [Channels(f"{self.root}{name}", tuple(axes)) for name, axes in named]

    def layers(self, name: str) -> Iterator[str]:
        number = 0
        while any(key.startswith(f"{self.root}{name}.{number}.") for key in self.state):
            yield f"{name}.{number}"
            number += 1

    def dit(self) -> None:
        """Of every layer's own embedding of time and class; the first's is read at the end too."""
        for number, layer in enumerate(self.layers("transformer_blocks")):
            own = f"time{number}"
            self.writes(f"{layer}.norm1.emb.timestep_embedder.linear_2", own)
            self.places(f"{layer}.norm1.emb.class_embedder.embedding_table.weight", own)
            self.reads(f"{layer}.norm1.linear", own)
        self.reads("proj_out_1", "time0")

    def parts(self, layer: str, parts: _Parts, axis: str) -> None:
        for name, does, mixed in parts:
            if does == "reads":
                self.reads(f"{layer}.{name}", axis, mixed)
            else:
                self.writes(f"{layer}.{name}", axis, mixed=mixed)

    def modulation(self, name: str, axis: str) -> None:
        """Chunks of one number per channel, all of which trade places as the channels do."""
        self.reads(name, "time")
        if (key := f"{self.root}{name}.weight") in self.state and self._axes[axis]:
            width = len(self._axes[axis][0].read(self.state))
            for start in range(0, len(self.state[key]), width):
                self.writes(name, axis, (start, start + width))

    def reads(self, name: str, axis: str, mixed: bool = False) -> None:
        self._note(f"{self.root}{name}.weight", None, axis, 1, mixed)

    def writes(
        self, name: str, axis: str, rows: tuple[int, int] | None = None, mixed: bool = False
    ) -> None:
        self._note(f"{self.root}{name}.weight", rows, axis, 0, mixed)
        self._note(f"{self.root}{name}.bias", rows, axis, 0, False)

    def places(self, name: str, axis: str) -> None:
        """An embedding, whose last axis it is."""
        if (key := f"{self.root}{name}") in self.state:
            self._note(key, None, axis, self.state[key].ndim - 1, False)

    def strange(self) -> str:
        """A matrix that nobody wrote down, of which it is not known what it reads and writes."""
        return next(
            (
                key
                for key, value in self.state.items()
                if key.startswith(self.root)
                and key not in self._seen
                and value.is_floating_point()
                and value.ndim > 1
                and not key.endswith(".linear_1.weight")
            ),
            "",
        )

    def _note(
        self, key: str, rows: tuple[int, int] | None, axis: str, dim: int, mixed: bool
    ) -> None:
        if key in self.state:
            self._seen.add(key)
            self._axes[axis].append(Axis(Slot(key, rows), dim, mixed=mixed))
