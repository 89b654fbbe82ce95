"""What mergekit returns, against the formula: one tensor, by our own merger of that name.

An option that the tool did not take (a misspelt key is ignored without a word) shows here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmark.api.contracts import Merger, Setting
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.merging.breadcrumbs import Breadcrumbs
from benchmark.merging.linear import TaskArithmetic
from benchmark.merging.mergekit_cli import Request
from benchmark.merging.model_stock import ModelStock
from benchmark.merging.slerp import Slerp
from benchmark.merging.streaming import wide
from benchmark.merging.ties import Ties

#: Error allowed on an entry, relative to the tensor's largest.
_TOLERANCE = 1e-5
#: Share of entries that may differ where a method selects: magnitudes that tie with the threshold.
_TIED = 1e-3


def check(out: State, request: Request, base: State, models: Mapping[str, State]) -> None:
    """Hold the largest tensor that moved to the formula, for methods that have one here.

    Raises:
        MethodError: more entries differ than rounding and ties explain.
    """
    names = list(request.models)
    found = _formula(request, names)
    moved = [
        key
        for key, old in base.items()
        if old.is_floating_point() and any(not torch.equal(models[n][key], old) for n in names)
    ]
    if found is None or not moved:
        return
    method, coefficients = found
    selects = isinstance(method, Ties | Breadcrumbs)
    key = max(moved, key=lambda k: base[k].numel())
    if selects and base[key].element_size() < 4:
        return  # in half precision a large share of the magnitudes tie
    # A weighted mean has no base; a sum of task vectors from zero is one.
    start = torch.zeros_like(base[key]) if request.method == "linear" else base[key]
    expected = method.merge(
        {key: start},
        [{key: models[name][key]} for name in names],
        Setting(coefficients),
        None,
        torch.Generator(),
    )[key]
    allowed = max(_TOLERANCE, 4 * torch.finfo(out[key].dtype).eps) * wide(base[key]).abs().max()
    gap = (wide(out[key]) - wide(expected)).abs()
    if float((gap > allowed).float().mean()) > (_TIED if selects else 0):
        raise MethodError(
            f"mergekit's {request.method} differs from its formula on {key!r} "
            f"by {float(gap.max()):.1e}"
        )


def _formula(request: Request, names: list[str]) -> tuple[Merger, tuple[float, ...]] | None:
    """Our merger and the members' coefficients that give the same."""
    first: Mapping[str, Any] = request.models[names[0]]
    options: dict[str, Any] = {**first, **request.shared}
    weights = tuple(float(request.models[n].get("weight", 1)) for n in names)  # type: ignore[arg-type]
    if options.get("rescale"):
        return None
    scale = options.get("lambda", 1.0)
    divided = tuple(scale * c / (sum(weights) or 1.0) for c in weights)
    plain = divided if options.get("normalize") else tuple(scale * c for c in weights)
    density = options.get("density", 1.0)
    match request.method:
        case "linear":
            return TaskArithmetic(), divided if options.get("normalize", True) else plain
        case "task_arithmetic":
            return TaskArithmetic(), plain
        case "breadcrumbs" if density > 0:
            return Breadcrumbs(density=density, gamma=options.get("gamma", 0.01)), plain
        case "ties" if density > 0:
            normalize = options.get("normalize", True)
            ours = Ties(density=density, scope="tensor", normalize=normalize, scale=scale)
            return ours, weights
        case "slerp":
            t = options["t"] if request.base == names[0] else 1 - options["t"]
            return Slerp(), (1 - t, t)
        case "model_stock" if not options.get("filter_wise"):
            return ModelStock(), weights
    return None
