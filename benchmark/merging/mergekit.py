"""mergekit, the tool a free-rider really uses, in memory (extra ``[mergekit]``, imported lazily).

The registry has one name per method, ``mergekit/ties`` and so on; parameters are mergekit's own,
``None`` leaves its default. What it returns is checked before anybody sees it: every key, shapes,
finite values, and for methods with a closed form one tensor against the formula. Whatever fails
becomes a MethodError with the tool's message, never a merge that seems to protect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.checkpoint import State, compatible
from benchmark.contracts import Card, Knowledge, Setting
from benchmark.errors import MethodError
from benchmark.merging.tau import GridMerger, active, wide

_INSTALL = "pip install 'unmergebench[mergekit]'"
#: Methods whose members have no weight: they are in or out.
_UNWEIGHTED = ("model_stock", "karcher", "arcee_fusion", "sce", "ram", "ramplus_tl")
#: Methods of one model or two, with a position t between base and member.
_BETWEEN = ("slerp", "nearswap")
#: Relative error allowed between the tool's tensor and its formula.
_TOLERANCE = 1e-5

Options = Mapping[str, object]


@dataclass(frozen=True)
class MergeKit(GridMerger):
    """One method of mergekit. Subclasses name it.

    Attributes:
        density: share of entries kept (ties, dare, breadcrumbs, della).
        gamma: share of outliers dropped (breadcrumbs).
        epsilon: spread of the drop probability (della).
        normalize: divide by the sum of weights.
        rescale: rescale what was dropped to its norm before.
        scale: mergekit's ``lambda``.
    """

    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    scale: float | None = None

    method: ClassVar[str] = "task_arithmetic"
    stochastic: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        summary="mergekit in memory",
        authors="Charles Goddard et al. (Arcee AI)",
        paper="Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        arxiv="2403.13257",
        fidelity="faithful",
        licence="LGPL-3.0 (the tool, used as a library)",
    )

    def search_space(self, members: int) -> list[Setting]:
        """Weights as for every merger; in or out, or a position between two, where it has none."""
        if self.method in _UNWEIGHTED:
            if self.method == "arcee_fusion" and members != 1:
                raise MethodError("mergekit's arcee_fusion merges one model into the base")
            without = [Setting((0.0, *(1.0,) * (members - 1)))] if members > 2 else []
            return [Setting((1.0,) * members), *without]
        if self.method in _BETWEEN:
            if members != 2:
                raise MethodError(f"mergekit's {self.method} merges exactly two models")
            return [Setting((1.0, 1.0), {"t": t}) for t in (0.2, 0.35, 0.5, 0.65, 0.8)]
        return super().search_space(members)

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        spec = _method(self.method).spec
        options = self._options({parameter.name for parameter in spec.parameters})
        seed = int(torch.randint(2**31, (), generator=rng))

        def merged(setting: Setting) -> State:
            members = active(setting, len(experts))
            out = self._run(base, [experts[i] for i, _ in members], members, setting, options, seed)
            compatible(out, base, f"mergekit's {self.method}")
            _check(self.method, out, base, experts, members, options)
            return out

        return merged

    def _options(self, known: set[str]) -> dict[str, object]:
        given = {
            "density": self.density,
            "gamma": self.gamma,
            "epsilon": self.epsilon,
            "normalize": self.normalize,
            "rescale": self.rescale,
            "lambda": self.scale,
        }
        chosen: dict[str, object] = {
            name: value for name, value in given.items() if value is not None
        }
        if unknown := chosen.keys() - known:
            raise MethodError(
                f"mergekit's {self.method} has no parameter {min(unknown)!r}; "
                f"it has {', '.join(sorted(known))}"
            )
        return chosen

    def _run(
        self,
        base: State,
        experts: Sequence[State],
        members: Sequence[tuple[int, float]],
        setting: Setting,
        options: Options,
        seed: int,
    ) -> State:
        from mergekit.merge_methods import merge_state_dicts

        method = _method(self.method)
        needs_base = method.spec.contract.base.name != "IGNORED" and self.method not in _BETWEEN
        names = [f"m{i}" for i, _ in members]
        models = dict(zip(names, experts, strict=True))
        parameters: dict[str, Any] = {
            key: dict.fromkeys(names, value) if key in ("density", "gamma", "epsilon") else value
            for key, value in options.items()
        }
        if any(parameter.name == "weight" for parameter in method.spec.parameters):
            parameters["weight"] = {f"m{i}": c for i, c in members}
        if self.method in _BETWEEN:
            parameters["t"] = setting.parameters["t"]
        try:
            # It draws from the global generator; the caller's stays where it was.
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                found = merge_state_dicts(
                    {"base": base, **models} if needs_base else models,
                    self.method,
                    parameters=parameters or None,
                    base="base" if needs_base else (names[0] if self.method in _BETWEEN else None),
                )
        except Exception as error:  # whatever the tool raises is its failure, not a defense
            first = (str(error).splitlines() or [""])[0]
            raise MethodError(
                f"mergekit's {self.method}: {type(error).__name__}: {first}"
            ) from error
        return {key: found[key] for key in base if key in found}


def _method(name: str) -> Any:
    try:
        from mergekit.merge_methods import get
    except ImportError:
        raise MethodError(f"mergekit is not installed: {_INSTALL}") from None
    return get(name)


def _check(
    method: str,
    out: State,
    base: State,
    experts: Sequence[State],
    members: Sequence[tuple[int, float]],
    options: Options,
) -> None:
    """The largest tensor against the formula, for methods that have one."""
    if method not in ("task_arithmetic", "linear"):
        return
    key = max((k for k, v in base.items() if v.is_floating_point()), key=lambda k: base[k].numel())
    weights = [c for _, c in members]
    default = method == "linear"
    total = sum(weights) if options.get("normalize", default) else 1.0
    if method == "linear":
        expected: Tensor | float = sum(c * wide(experts[i][key]) for i, c in members) / total
    else:
        tau = sum(c * (wide(experts[i][key]) - wide(base[key])) for i, c in members)
        expected = wide(base[key]) + float(options.get("lambda", 1.0)) * tau / total  # type: ignore[arg-type]
    gap = float((wide(out[key]) - expected).abs().max() / wide(base[key]).abs().max())
    if gap > max(_TOLERANCE, 4 * torch.finfo(out[key].dtype).eps):
        raise MethodError(f"mergekit's {method} differs from its formula on {key!r} by {gap:.1e}")


def _named(method: str, draws: bool = False) -> type[MergeKit]:
    card = Card(**{**vars(MergeKit.card), "summary": f"mergekit's {method}, in memory"})
    fields = {"method": method, "stochastic": draws, "card": card, "__module__": __name__}
    name = "".join(part.title() for part in method.split("_"))
    return dataclass(frozen=True)(type(name, (MergeKit,), {**fields, "__qualname__": name}))


Linear = _named("linear")
TaskArithmetic = _named("task_arithmetic")
Ties = _named("ties")
DareTies = _named("dare_ties", draws=True)
DareLinear = _named("dare_linear", draws=True)
Breadcrumbs = _named("breadcrumbs")
BreadcrumbsTies = _named("breadcrumbs_ties")
Della = _named("della", draws=True)
DellaLinear = _named("della_linear", draws=True)
Slerp = _named("slerp")
Nuslerp = _named("nuslerp")
Multislerp = _named("multislerp")
Karcher = _named("karcher")
ModelStock = _named("model_stock")
Sce = _named("sce")
Ram = _named("ram")
RamplusTl = _named("ramplus_tl")
Nearswap = _named("nearswap")
