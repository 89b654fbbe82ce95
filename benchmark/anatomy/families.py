"""Where each architecture keeps its blocks: one row of name templates per family.

A row names the tensors of one layer below ``layer`` (``{}`` is the layer's number); whatever
stands before it (``bert.``, ``vision_model.``, ``visual.transformer.``) is read off the model, so
one row covers bare models, models with heads, wrappers, and both towers of CLIP. In the manner of
Git Re-Basin's permutation specs (Ainsworth et al. 2023, arXiv 2209.04836).

To support another architecture, add a row. Names alone prove nothing: ESM uses BERT's names with
rotary embeddings. So a row also lists the attention classes whose gauge group was checked, and
``tests/test_anatomy.py`` must pass on a tiny model of it (``tests/zoo.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from benchmark.anatomy.blocks import Anatomy, AttentionBlock, Linear, MLPBlock, Slot
from benchmark.errors import UsageError


@dataclass(frozen=True)
class Family:
    """One row. Names are relative to ``layer`` and lack ``.weight`` / ``.bias``.

    ``q`` = ``k`` = ``v`` means one fused tensor with the three stacked in that order.
    ``join`` stands between a name and ``weight`` or ``bias`` in the q, k and v names.
    ``classes`` are the classes of the module that owns q whose gauge group was checked.
    """

    name: str
    layer: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    classes: tuple[str, ...]
    gate: str | None = None
    join: str = "."
    transposed: bool = False
    rotary: bool = False

    def layers(self, names: Iterable[str]) -> list[str]:
        """``encoder.layer.0.``, ``encoder.layer.1.``, … with their prefixes, in order."""
        layer = re.escape(self.layer).replace(r"\{\}", r"(\d+)")
        query = re.escape(f"{self.q}{self.join}weight")
        pattern = re.compile(rf"((?:.*\.)?){layer}\.{query}")
        found = sorted(
            (match[1], int(match[2])) for name in names if (match := pattern.fullmatch(name))
        )
        return [f"{prefix}{self.layer.format(number)}." for prefix, number in found]


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
)


def find(model: nn.Module) -> Anatomy:
    """The blocks of ``model``: of every tower, in the order of their names.

    Raises:
        UsageError: no row fits, a layer lacks a tensor its row names, or its attention class is
            not one that was checked.
    """
    state = model.state_dict()
    matches = [(family, layer) for family in FAMILIES for layer in family.layers(state)]
    if not matches:
        looked = "; ".join(f"{f.name}: {f.layer}.{f.q}{f.join}weight" for f in FAMILIES)
        raise UsageError(
            f"unknown architecture {type(model).__name__}: no tensor named like ({looked}); "
            "add a row to benchmark/anatomy/families.py"
        )
    blocks = [_read(model, state, family, layer) for family, layer in matches]
    return Anatomy(
        family="+".join(dict.fromkeys(family.name for family, _ in matches)),
        attention=tuple(attention for attention, _ in blocks),
        mlp=tuple(mlp for _, mlp in blocks),
    )


def _read(
    model: nn.Module, state: Mapping[str, Tensor], family: Family, layer: str
) -> tuple[AttentionBlock, MLPBlock]:
    attention = _attention(model, family, layer)
    heads = _heads(attention)
    kv_heads = int(getattr(attention, "num_key_value_heads", heads))

    def linear(name: str, join: str = ".", part: int | None = None) -> Linear:
        weight = f"{layer}{name}{join}weight"
        if weight not in state:
            raise UsageError(
                f"{type(model).__name__} looks like the family {family.name!r} but has no tensor "
                f"{weight!r} (another kind of block, such as a gated MLP, is not supported yet)"
            )
        bias = f"{layer}{name}{join}bias"
        return Linear(
            _slot(state[weight], weight, part, family.transposed),
            _slot(state[bias], bias, part) if bias in state else None,
        )

    fused = family.q == family.k == family.v
    q, k, v = (
        linear(name, family.join, part if fused else None)
        for part, name in enumerate((family.q, family.k, family.v))
    )
    rows = len(k.weight.read(state))
    if rows % kv_heads:
        raise UsageError(f"{layer}: {rows} key rows do not divide into {kv_heads} heads")
    block = AttentionBlock(
        q=q,
        k=k,
        v=v,
        o=linear(family.o),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=rows // kv_heads,
        rotary=family.rotary,
    )
    gate = linear(family.gate) if family.gate else None
    mlp = MLPBlock(
        up=linear(family.up),
        down=linear(family.down),
        gate=gate,
        activation=_activation(attention, model.get_submodule(layer.rstrip("."))),
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


def _heads(attention: nn.Module) -> int:
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        if isinstance(heads := getattr(attention, name, None), int):
            return heads
    raise UsageError(f"{type(attention).__name__} does not say how many heads it has")


def _activation(attention: nn.Module, layer: nn.Module) -> str:
    """The name in the model's configuration; open_clip has none, but a class for QuickGELU."""
    config = getattr(attention, "config", None)
    for name in ("hidden_act", "activation"):
        if isinstance(activation := getattr(config, name, None), str):
            return activation
    quick = any(type(module).__name__ == "QuickGELU" for module in layer.modules())
    return "quick_gelu" if quick else "gelu"
