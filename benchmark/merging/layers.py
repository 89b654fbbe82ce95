"""Coefficients that change with depth: a merged model put together from plain merges.

The layers are cut into bands of equal depth, and each band has a coefficient per member. A band's
tensors are those of the plain merge with its coefficients, so B bands over G combinations are G
merges, whatever the G^B settings. What is said of whole task vectors (TIES' global threshold)
stays said of whole ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from benchmark.api.contracts import Setting
from benchmark.core.state import State

_LAYER = re.compile(r"\.(\d+)\.")


def by_layer(merge: Callable[[Setting], State], base: State, setting: Setting) -> State:
    """The merge of ``setting``, from ``merge`` of settings without layers."""
    if not setting.layers:
        return merge(setting)
    made = {
        c: merge(Setting(c, setting.parameters)) if any(c) else base
        for c in dict.fromkeys(setting.layers)
    }
    band = bands(base, len(setting.layers))
    return {key: made[setting.layers[band[key]]][key] for key in base}


def bands(keys: Iterable[str], count: int) -> dict[str, int]:
    """key → which of ``count`` bands of depth it belongs to.

    A layer's number is the first number in the name; towers (what stands before it) are cut each by
    itself. Unnumbered tensors belong to the first band if they are embeddings, else to the last.
    """
    names = list(keys)
    found = {key: match for key in names if (match := _LAYER.search(key))}
    deepest: dict[str, int] = {}
    for key, match in found.items():
        tower = key[: match.start()]
        deepest[tower] = max(deepest.get(tower, 0), int(match[1]))
    out = {}
    for key in names:
        if key in found:
            layers = deepest[key[: found[key].start()]] + 1
            out[key] = int(found[key][1]) * count // layers
        else:
            out[key] = 0 if "embed" in key else count - 1
    return out
