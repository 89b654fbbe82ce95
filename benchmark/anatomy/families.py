"""Where each architecture keeps its blocks: one row of name templates per family.

A row names the tensors of one layer below ``layer`` (``{}`` is the layer's number); whatever
stands before it (``bert.``, ``vision_model.``, ``visual.transformer.``) is read off the model, so
one row covers bare models, models with heads, wrappers, and both towers of CLIP. In the manner of
Git Re-Basin's permutation specs (Ainsworth et al. 2023, arXiv 2209.04836).

To support another architecture, add a row. Names alone prove nothing: ESM uses BERT's names with
rotary embeddings. So a row also lists the attention classes whose gauge group was checked, and
``tests/test_anatomy.py`` must pass on a tiny model of it (``tests/zoo.py``). Convolutional towers
have rows of their own kind, in :mod:`benchmark.anatomy.convolutional`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmark.anatomy.blocks import AttentionBlock, Channels, Linear, MLPBlock, Slot
from benchmark.anatomy.convolutional import ROWS, towers
from benchmark.core.errors import UsageError


@dataclass(frozen=True)
class Family:
    """One row. Names are relative to ``layer`` and lack ``.weight`` / ``.bias``.

    ``q`` = ``k`` = ``v`` means one fused tensor with the three stacked in that order.
    ``join`` stands between a name and ``weight`` or ``bias`` in the q, k and v names.
    ``classes`` are the classes of the module that owns q whose gauge group was checked.
    A row without ``up`` and ``down`` is attention alone (T5's decoders have two per block).
    ``gate`` is the activated branch of a gated MLP. ``qk_norm``: the gains of Q's and K's norm.
    """

    name: str
    layer: str
    q: str
    k: str
    v: str
    o: str
    classes: tuple[str, ...]
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    qk_norm: tuple[str, str] | None = None
    join: str = "."
    transposed: bool = False
    rotary: bool = False
    fixed_heads: bool = False

    def layers(self, names: Iterable[str]) -> list[str]:
        """``encoder.layer.0.``, ``encoder.layer.1.``, … with their prefixes, in order."""
        layer = re.escape(self.layer).replace(r"\{\}", r"(\d+)")
        query = re.escape(f"{self.q}{self.join}weight")
        pattern = re.compile(rf"((?:.*\.)?){layer}\.{query}")
        found = sorted(
            (match[1], int(match[2])) for name in names if (match := pattern.fullmatch(name))
        )
        return [f"{prefix}{self.layer.format(number)}." for prefix, number in found]

    def weights(self) -> Iterator[str]:
        """The weights that each layer must have, relative to it."""
        for name in (self.q, self.k, self.v):
            yield f"{name}{self.join}weight"
        for name in (self.o, self.up, self.down, self.gate, *(self.qk_norm or ())):
            if name is not None:
                yield f"{name}.weight"


def _t5(name: str, up: str, gate: str | None = None) -> tuple[Family, ...]:
    """Encoder layers; decoder layers' self-attention; their cross-attention with the MLP."""

    def row(part: str, layer: str, attention: str, mlp: str | None) -> Family:
        q, k, v, o = (f"{attention}.{letter}" for letter in "qkvo")
        inner = None if mlp is None else f"{mlp}.DenseReluDense"
        return Family(
            name=f"{name}-{part}",
            layer=layer,
            q=q,
            k=k,
            v=v,
            o=o,
            up=inner and f"{inner}.{up}",
            down=inner and f"{inner}.wo",
            gate=inner and gate and f"{inner}.{gate}",
            classes=("T5Attention",),
            fixed_heads=True,
        )

    return (
        row("encoder", "encoder.block.{}", "layer.0.SelfAttention", "layer.1"),
        row("decoder", "decoder.block.{}", "layer.0.SelfAttention", None),
        row("cross", "decoder.block.{}", "layer.1.EncDecAttention", "layer.2"),
    )


_LLAMA: Any = {
    "layer": "layers.{}",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "rotary": True,
}
_BERTS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="bert",
        layer="encoder.layer.{}",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        classes=tuple(f"{name}SelfAttention" for name in _BERTS),
    ),
    Family(
        name="distilbert",
        layer="transformer.layer.{}",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        classes=("DistilBertSelfAttention",),
    ),
    Family(
        name="vit",
        layer="layers.{}",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("ViTAttention",),
    ),
    Family(
        name="dinov2",
        layer="encoder.layer.{}",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("Dinov2Attention",),
    ),
    Family(
        name="clip",
        layer="encoder.layers.{}",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        classes=("CLIPAttention",),
    ),
    Family(
        name="open-clip",
        layer="resblocks.{}",
        q="attn.in_proj",
        k="attn.in_proj",
        v="attn.in_proj",
        o="attn.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        classes=("MultiheadAttention",),
        join="_",
    ),
    Family(
        name="gpt2",
        layer="h.{}",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        classes=("GPT2Attention",),
        transposed=True,
    ),
    *_t5("t5", up="wi"),
    *_t5("t5-gated", up="wi_1", gate="wi_0"),
    Family(
        name="qwen3",
        **_LLAMA,
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        classes=("Qwen3Attention", "Gemma3Attention"),
    ),
    Family(
        name="llama",
        **_LLAMA,
        classes=("LlamaAttention", "MistralAttention", "Qwen2Attention", "Gemma2Attention"),
    ),
)


class Found(NamedTuple):
    """What the table says of a model: the fields of :class:`benchmark.anatomy.Anatomy`."""

    family: str
    attention: tuple[AttentionBlock, ...]
    mlp: tuple[MLPBlock, ...]
    channels: tuple[Channels, ...]


def find(model: nn.Module) -> Found:
    """The blocks of ``model``: of every tower, in the order of their names.

    Raises:
        UsageError: no row fits, a layer lacks a tensor its row names, or its attention class is
            not one that was checked.
    """
    state = model.state_dict()
    candidates = [(family, layer) for family in FAMILIES for layer in family.layers(state)]
    convolutional = towers(model)
    if not candidates and not convolutional:
        looked = "; ".join(f"{f.name}: {f.layer}.{f.q}{f.join}weight" for f in FAMILIES)
        looked += "".join(f"; {type(row).__name__}: {row.mark}" for row in ROWS)
        raise UsageError(
            f"unknown architecture {type(model).__name__}: no tensor named like ({looked}); "
            "add a row to benchmark/anatomy/families.py"
        )
    # The first row with all of its weights speaks for an attention layer: qwen3 before llama.
    rows: dict[str, tuple[Family, str]] = {}
    for family, layer in candidates:
        if all(layer + weight in state for weight in family.weights()):
            rows.setdefault(layer + family.q, (family, layer))
    for family, layer in candidates:
        if layer + family.q not in rows:
            lacking = next(layer + w for w in family.weights() if layer + w not in state)
            raise UsageError(
                f"{type(model).__name__} looks like the family {family.name!r} but has no tensor "
                f"{lacking!r} (another kind of block, such as a gated MLP, is not supported yet)"
            )
    blocks = [_read(model, state, family, layer) for family, layer in rows.values()]
    names = [family.name for family, _ in rows.values()] + [name for name, _, _ in convolutional]
    mlps = [mlp for _, mlp in blocks if mlp is not None]
    return Found(
        family="+".join(dict.fromkeys(names)),
        attention=tuple(attention for attention, _ in blocks),
        mlp=(*mlps, *(mlp for _, found, _ in convolutional for mlp in found)),
        channels=tuple(units for _, _, found in convolutional for units in found),
    )


def _read(
    model: nn.Module, state: Mapping[str, Tensor], family: Family, layer: str
) -> tuple[AttentionBlock, MLPBlock | None]:
    attention = _attention(model, family, layer)

    def linear(name: str, join: str = ".", part: int | None = None) -> Linear:
        weight, bias = (f"{layer}{name}{join}{kind}" for kind in ("weight", "bias"))
        return Linear(
            _slot(state[weight], weight, part, family.transposed),
            _slot(state[bias], bias, part) if bias in state else None,
        )

    fused = family.q == family.k == family.v
    q, k, v = (
        linear(name, family.join, part if fused else None)
        for part, name in enumerate((family.q, family.k, family.v))
    )
    rows, kv_rows = (len(side.weight.read(state)) for side in (q, k))
    size = _head_dim(attention, rows)
    if rows % kv_rows or kv_rows % size:
        raise UsageError(f"{layer}: {rows} query and {kv_rows} key rows are not whole heads")
    block = AttentionBlock(
        q=q,
        k=k,
        v=v,
        o=linear(family.o),
        heads=rows // size,
        kv_heads=kv_rows // size,
        head_dim=size,
        rotary=family.rotary,
        fixed_heads=family.fixed_heads,
        qk_norm=None
        if family.qk_norm is None
        else (
            Slot(f"{layer}{family.qk_norm[0]}.weight"),
            Slot(f"{layer}{family.qk_norm[1]}.weight"),
        ),
    )
    if family.up is None or family.down is None:
        return block, None
    mlp = MLPBlock(
        up=linear(family.up),
        down=linear(family.down),
        gate=linear(family.gate) if family.gate else None,
        activation=_activation(model, attention, model.get_submodule(layer.rstrip("."))),
    )
    return block, mlp


def _slot(value: Tensor, key: str, part: int | None, transposed: bool = False) -> Slot:
    """The whole tensor, or the third ``part`` of a fused one along its output axis."""
    transposed = transposed and value.ndim == 2
    if part is None:
        return Slot(key, transposed=transposed)
    size = value.shape[1 if transposed else 0] // 3
    return Slot(key, rows=(part * size, (part + 1) * size), transposed=transposed)


def _attention(model: nn.Module, family: Family, layer: str) -> nn.Module:
    """The module that owns the query projection, if its class is one the row answers for."""
    owner = model.get_submodule((layer + family.q).rpartition(".")[0])
    if type(owner).__name__ not in family.classes:
        raise UsageError(
            f"{type(model).__name__} has the tensor names of family {family.name!r}, but its "
            f"attention class {type(owner).__name__} is none of {', '.join(family.classes)}: "
            "check its gauge group (rotary? relative positions?) and add it to "
            "benchmark/anatomy/families.py"
        )
    return owner


def _head_dim(attention: nn.Module, rows: int) -> int:
    """Rows per head.

    Raises:
        UsageError: the module says neither that nor how many heads it has, or rotates only a part.
    """
    rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    if isinstance(rope, Mapping) and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"{type(attention).__name__} rotates only a part of each head, which is not supported"
        )
    if isinstance(size := getattr(attention, "head_dim", None), int):
        return size
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        if isinstance(heads := getattr(attention, name, None), int):
            return rows // heads
    raise UsageError(f"{type(attention).__name__} does not say how many heads it has")


def _activation(model: nn.Module, attention: nn.Module, layer: nn.Module) -> str:
    """The name in the configuration; open_clip has none, but a class for QuickGELU."""
    for config in (getattr(attention, "config", None), getattr(model, "config", None)):
        for name in (
            "hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn",
        ):  # fmt: skip
            if isinstance(activation := getattr(config, name, None), str):
                return activation
    quick = any(type(module).__name__ == "QuickGELU" for module in layer.modules())
    return "quick_gelu" if quick else "gelu"
