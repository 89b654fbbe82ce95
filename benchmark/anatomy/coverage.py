"""Nothing in part: the weights of a model that no row of the tables answers for.

A row proves what it says of the tensors it names, and nothing of those beside it. A second tower of
another family, an attention that crosses over to another model, a projector between two: a lock
that leaves these out protects a part, and an attack that leaves them out proves nothing. Meant are
the weights of attention, MLPs and convolutions: whatever a numbered layer multiplies with, and
every module that is called one. Embeddings, patch embeddings, single projections and the heads of
tasks are none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from benchmark.anatomy.blocks import AttentionBlock, Channels, MLPBlock

#: Inside a list of layers.
_LAYER = re.compile(r"(?:^|\.)\d+\.")
#: What classes call themselves that multiply and activate, wherever they stand.
_BLOCK = re.compile(r"MLP|Mlp|FeedForward|FFN|Projector|GLU")
#: Parts of the name of a task's head, which no method touches.
_HEAD = re.compile(
    r"(?:^|\.)(classifier|classification_head|cls|head|heads|lm_head|pooler|pre_classifier|"
    r"qa_outputs|score|predictions|vocab_\w+)(?:\.|$)"
)
#: What brings a stage to the next one's size: one linear map, no block.
_BETWEEN = re.compile(r"(?:^|\.)downsample\.reduction(?:\.|$)")
#: Images have no more channels: what convolves them embeds their patches.
_COLOURS = 4
#: In the names of a module's own parameters that are added, not multiplied with.
_ADDED = re.compile(r"bias|embed|pos|token|latent|query_tokens|probe|table")


def uncovered(
    model: nn.Module,
    attention: Sequence[AttentionBlock],
    mlp: Sequence[MLPBlock],
    channels: Sequence[Channels],
    beside: Sequence[str] = (),
) -> tuple[str, ...]:
    """Keys of ``model.state_dict()``, in its order, that should be in a block and are in none.

    ``beside``: patterns of further names that a row answers for (the router of experts).
    """
    known = set(_known(attention, mlp, channels))
    owners = dict(model.named_modules())
    seen: set[int] = set()
    found = []
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:  # tied to one that was looked at
            continue
        seen.add(id(value))
        owner, _, name = key.rpartition(".")
        if (
            key not in known
            and value.is_floating_point()
            and _multiplies(owners[owner], name, value)
            and _inside(owner, owners)
            and not any(re.fullmatch(pattern, key) for pattern in beside)
        ):
            found.append(key)
    return tuple(found)


def _known(
    attention: Sequence[AttentionBlock], mlp: Sequence[MLPBlock], channels: Sequence[Channels]
) -> Iterator[str]:
    for block in attention:
        for linear in block.linears().values():
            yield linear.weight.key
    for units in mlp:
        for part in (units.up, units.gate, units.down):
            if part is not None:
                yield part.weight.key
    for each in channels:
        yield from (axis.slot.key for axis in each.axes)


def _multiplies(module: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a tensor is a matrix or filter that what flows through is multiplied with."""
    if isinstance(module, nn.Embedding) or sum(size > 1 for size in value.shape) < 2:
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.kernel_size != module.stride and module.in_channels > _COLOURS
    return not _ADDED.search(name)


def _inside(owner: str, owners: dict[str, nn.Module]) -> bool:
    """Whether a module is part of an attention, of a numbered layer or an MLP, but of no head."""
    if _BETWEEN.search(owner):
        return False
    parts = owner.split(".")
    above = [type(owners[".".join(parts[:n])]).__name__ for n in range(1, len(parts) + 1)]
    if any("Attention" in name for name in above):
        return True
    layer, head = _LAYER.search(f"{owner}."), _HEAD.search(owner)
    if head and not (layer and layer.start() < head.start()):
        return False
    return layer is not None or any(_BLOCK.search(name) for name in above)
