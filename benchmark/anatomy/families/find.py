"""What the table says of a model: its blocks, as references into its State."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from benchmark.anatomy.blocks import AttentionBlock, Axis, Channels, Joint, Linear, MLPBlock, Slot
from benchmark.anatomy.convolutional import towers
from benchmark.anatomy.coverage import uncovered
from benchmark.anatomy.families import FAMILIES, Family
from benchmark.anatomy.families.loose import loose
from benchmark.anatomy.filters import filters
from benchmark.anatomy.unet import unets
from benchmark.core.errors import UsageError

#: What lies beside the projections and is per head: ``fixed_heads`` answers for it.
_PER_HEAD = re.compile(r".*(relative_attention_bias\.weight|relative_position_bias_table)")


class Found(NamedTuple):
    """What the table says of a model: the fields of :class:`benchmark.anatomy.Anatomy`."""

    family: str
    attention: tuple[AttentionBlock, ...]
    mlp: tuple[MLPBlock, ...]
    channels: tuple[Channels, ...]
    uncovered: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...]


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
        raise UsageError(f"unknown architecture {type(model).__name__}: {_like(model, state)}")
    # The first row with all of its weights speaks for an attention layer (qwen3 before llama), of
    # those that answer for its class if any does.
    fits: dict[str, list[tuple[Family, str]]] = {}
    for family, layer in candidates:
        if all(layer + weight in state for weight in family.weights()):
            fits.setdefault(layer + family.q, []).append((family, layer))
    rows = {
        query: min(found, key=lambda fit: (_objection(model, *fit) != "", not _knows(model, *fit)))
        for query, found in fits.items()
    }
    for query in dict.fromkeys(layer + family.q for family, layer in candidates):
        if query not in rows:
            alike = {family: layer for family, layer in candidates if layer + family.q == query}
            near = _nearest(alike, state) or next(iter(alike))
            lacking = next(w for w in near.weights() if alike[near] + w not in state)
            raise UsageError(
                f"{type(model).__name__} looks like {near.name!r} but has no tensor "
                f"{alike[near] + lacking!r} (gated MLP? fused?); add a row to {__package__}"
            )
    blocks = [_read(model, state, family, layer) for family, layer in rows.values()]
    names = [family.name for family, _ in rows.values()] + [
        name for _, (name, _, _) in convolutional
    ]
    attention = tuple(attention for attention, _ in blocks)
    mlps = tuple(mlp for _, mlp in blocks if mlp is not None)
    mlps += (*loose(model), *(mlp for _, (_, found, _) in convolutional for mlp in found))
    channels = tuple(units for _, (_, _, found) in convolutional for units in found)
    channels += tuple(filters(model))
    nets = unets(model)
    channels += tuple(units for _, found in nets for units in found)
    names += ["unet"] * bool(nets)
    # What a convolutional row does not know it refuses itself.
    beside = [rf"{re.escape(prefix)}.*" for prefix, _ in convolutional]
    beside += [re.escape(layer) + family.beside for family, layer in rows.values() if family.beside]
    return Found(
        family="+".join(dict.fromkeys(names)),
        attention=attention,
        mlp=mlps,
        channels=channels,
        uncovered=uncovered(model, attention, mlps, channels, beside),
        tied=_tied(model),
        rows=tuple(family.name for family, _ in rows.values()),
    )


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return tuple(tuple(found) for found in names.values() if len(found) > 1)


def _like(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What comes nearest to a model that no row fits."""
    attends = any("ttention" in type(module).__name__ for module in model.modules())
    if not attends and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return (
            "of convolutional networks ConvNeXt and ResNet have rows; add one to "
            "benchmark.anatomy.convolutional"
        )
    found = _nearest(FAMILIES, state)
    like = f"the nearest row, {found.name!r}, wants {found.layer}.{found.q}" if found else ""
    return f"{like or 'no row is near'}; add one to {__package__}"


def _nearest(families: Iterable[Family], names: Iterable[str]) -> Family | None:
    """The row that shares most of its words with the tensors of a model, if any shares one."""

    def words(names: Iterable[str]) -> set[str]:
        found = {word for name in names for word in re.split(r"[._]", name)}
        return {word for word in found - {"weight", "bias"} if not word.isdigit()}

    there, shares = words(names), dict[Family, float]()
    for family in families:
        own = words(family.weights())
        shares[family] = len(own & there) / len(own)
    near = max(shares, key=lambda family: shares[family])
    return near if shares[near] else None


def _read(
    model: nn.Module, state: Mapping[str, Tensor], family: Family, layer: str
) -> tuple[AttentionBlock, MLPBlock | None]:
    if objection := _objection(model, family, layer):
        raise UsageError(objection)
    attention = _owner(model, family, layer)

    def linear(
        name: str,
        join: str = ".",
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Linear:
        weight, bias = (f"{layer}{name}{join}{kind}" for kind in ("weight", "bias"))
        return Linear(
            Slot(weight, rows, family.transposed, every, columns=columns),
            Slot(bias, rows, every=every) if bias in state else None,
        )

    every: int | None = None
    parts: tuple[tuple[int, int] | None, ...] = (None, None, None)
    whole = linear(family.q, family.join).weight.read(state)
    if family.q == family.k == family.v:
        every, parts = _parts(attention, family, layer, len(whole))
    elif family.k == family.v:
        half = len(linear(family.k, family.join).weight.read(state)) // 2
        parts = None, (0, half), (half, 2 * half)
    q, k, v = (
        linear(name, family.join, part)
        for name, part in zip((family.q, family.k, family.v), parts, strict=True)
    )
    every = None
    rows, kv_rows = (len(side.weight.read(state)) for side in (q, k))
    size = _head_dim(attention, rows)
    if rows % kv_rows or kv_rows % size:
        raise UsageError(f"{layer}: {rows} query and {kv_rows} key rows are not whole heads")
    entering: tuple[tuple[int, int] | None, ...] = (None, None)
    if family.o == family.down:
        entering = (0, rows), (rows, linear(family.o).weight.read(state).shape[1])
    rotary = family.rotary and getattr(attention, family.turns, True) not in (None, False, 0)
    block = AttentionBlock(
        q=q,
        k=k,
        v=v,
        o=linear(family.o, columns=entering[0]),
        heads=rows // size,
        kv_heads=kv_rows // size,
        head_dim=size,
        rotary=rotary,
        rotated=_rotated(attention, size) if rotary else None,
        interleaved=family.interleaved and rotary,
        fixed_heads=family.fixed_heads,
        whole_norm=family.whole_norm,
        cosine=family.cosine,
        met=family.met,
        joint=None if family.joint is None else _joint(state, layer, family.joint),
        qk_norm=None
        if family.qk_norm is None
        else (
            Slot(f"{layer}{family.qk_norm[0]}.weight"),
            Slot(f"{layer}{family.qk_norm[1]}.weight"),
        ),
    )
    named = {slot.key for side in block.linears().values() for slot in side.slots()}
    named.update(slot.key for slot in block.qk_norm or ())
    within = f"{(layer + family.q).rpartition('.')[0]}."
    for key, value in state.items():
        strange = key.startswith(within) and key not in named and value.is_floating_point()
        known = _PER_HEAD.fullmatch(key) or re.fullmatch(re.escape(layer) + family.beside, key)
        if strange and not known:
            raise UsageError(
                f"{type(model).__name__} is like {family.name!r}, whose row does not know what "
                f"{key!r} does to attention (a norm of queries and keys?)"
            )
    if family.up is None or family.down is None:
        return block, None
    halves: tuple[tuple[int, int] | None, ...] = (None, None)
    if family.gate == family.up:
        half = len(linear(family.up).weight.read(state)) // 2
        halves = (0, half), (half, 2 * half)
    inner = (f"{layer}{family.inner}.{kind}" for kind in ("weight", "bias"))
    mlp = MLPBlock(
        norm=tuple(Slot(key) for key in inner if key in state) if family.inner else (),
        gate=linear(family.gate, rows=halves[0]) if family.gate else None,
        up=linear(family.up, rows=halves[1]),
        down=linear(family.down, columns=entering[1]),
        activation=family.activation or _activation(model, attention, layer.rstrip(".")),
    )
    _check_mlp(model, state, mlp, family, layer)
    return block, mlp


def _joint(state: Mapping[str, Tensor], layer: str, names: tuple[str, str, str, str]) -> Joint:
    q, k, v, o = (Linear.named(f"{layer}{name}", state) for name in names)
    return Joint(q, k, v, o if o.weight.key in state else None)


def _check_mlp(
    model: nn.Module, state: Mapping[str, Tensor], mlp: MLPBlock, family: Family, layer: str
) -> None:
    """Refuse an MLP of other parts than the row knows: another width behind, a norm between."""
    up, down = (len(part.read(state)) for part in (mlp.up.weight, Axis(mlp.down.weight, 1)))
    named = {axis.slot.key for axis in mlp.axes} | {slot.key for slot in mlp.down.slots()}
    inside = f"{mlp.up.weight.key.removesuffix('.weight').rpartition('.')[0]}."
    strange = [k for k in state if k.startswith(inside) and k not in named and inside != layer]
    if up != down or strange:
        what = f"{strange[0]!r}" if strange else f"{up} units before and {down} behind"
        raise UsageError(
            f"{type(model).__name__} is like {family.name!r}, whose row does not know the MLP with "
            f"{what} (a norm between? gate and up in one?)"
        )


def _parts(
    attention: nn.Module, family: Family, layer: str, rows: int
) -> tuple[int | None, tuple[tuple[int, int], ...]]:
    """Where queries, keys and values lie in a fused tensor: of every so many rows, which."""
    size, heads = _head_dim(attention, rows // 3), _heads(attention)
    kv_heads = (rows // size - heads) // 2
    if (heads + 2 * kv_heads) * size != rows or kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"{layer}: {rows} rows are not queries, keys and values of {heads} heads")
    groups = kv_heads if family.per_head else 1
    q, kv = heads // groups * size, kv_heads // groups * size
    every = rows // groups if groups > 1 else None
    return every, ((0, q), (q, q + kv), (q + kv, q + 2 * kv))


def _owner(model: nn.Module, family: Family, layer: str) -> nn.Module:
    """The module that owns the query projection."""
    return model.get_submodule((layer + family.q).rpartition(".")[0])


def _knows(model: nn.Module, family: Family, layer: str) -> bool:
    """Whether the class of the attention is one that the row answers for."""
    owner = type(_owner(model, family, layer))
    # A name that many classes have is given with its module.
    return not {owner.__name__, f"{owner.__module__}.{owner.__name__}"}.isdisjoint(family.classes)


def _objection(model: nn.Module, family: Family, layer: str) -> str:
    """Why the row does not answer for this attention, or nothing."""
    owner = _owner(model, family, layer)
    if not _knows(model, family, layer):
        return (
            f"{type(model).__name__} has the tensor names of {family.name!r}, but its attention "
            f"class {type(owner).__name__} was not checked: rotary? relative positions? "
            f"If not, add it to {__package__}"
        )
    runs = type(getattr(owner, "processor", None)).__name__
    if family.processors and runs not in family.processors:
        return (
            f"{type(model).__name__} is like {family.name!r}, but what runs its attention, {runs}, "
            f"was not checked: rotary? norms? If not, add it to {__package__}"
        )
    for name, wanted in family.settings:
        said = (_setting(module, name) for module in (owner, *_around(model, layer)))
        found = next((value for value in said if value is not None), None)
        if found != wanted:
            return (
                f"{type(model).__name__} is like {family.name!r}, whose gauge group was checked "
                f"with {name}={wanted}, not {found}"
            )
    return ""


def _around(model: nn.Module, layer: str) -> Iterator[nn.Module]:
    """The layer and the modules that hold it, the nearest first."""
    parts = layer.rstrip(".").split(".")
    for n in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:n]))


def _setting(module: nn.Module, name: str) -> object:
    """What the module itself or its configuration says."""
    return getattr(module, name, getattr(getattr(module, "config", None), name, None))


def _head_dim(attention: nn.Module, rows: int) -> int:
    """Rows per head."""
    for name in ("head_dim", "head_size"):
        if isinstance(size := getattr(attention, name, None), int):
            return size
    return rows // _heads(attention)


def _heads(attention: nn.Module) -> int:
    """Query heads.

    Raises:
        UsageError: the module does not say.
    """
    for name in ("num_attention_heads", "num_heads", "n_heads", "heads"):
        if isinstance(heads := _setting(attention, name), int):
            return heads
    raise UsageError(f"{type(attention).__name__} does not say how many heads it has")


def _rotated(attention: nn.Module, size: int) -> int | None:
    """How many rows of each head are rotated, if not all."""
    for name in ("rotary_ndims", "rotary_dim"):
        if isinstance(rows := getattr(attention, name, None), int):
            return rows if rows < size else None
    rope = _setting(attention, "rope_parameters")
    share = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, Mapping) else 1.0
    return int(size * share) if share != 1.0 else None


def _activation(model: nn.Module, attention: nn.Module, layer: str) -> str:
    """The name in the configuration of the nearest module around the layer that has one; open_clip
    and BLOOM have none, but classes."""
    holders = (attention, *_around(model, layer))
    for config in (getattr(module, "config", None) for module in holders):
        for name in (
            "hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn",
        ):  # fmt: skip
            if isinstance(activation := getattr(config, name, None), str):
                return activation
    named = {"QuickGELU": "quick_gelu", "BloomGelu": "gelu_pytorch_tanh"}
    classes = (type(module).__name__ for module in model.get_submodule(layer).modules())
    return next((named[name] for name in classes if name in named), "gelu")
