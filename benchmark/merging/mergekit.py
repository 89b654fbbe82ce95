"""mergekit, the tool a free-rider really uses (extra ``[mergekit]``, imported lazily).

The registry has one name per method, ``mergekit/ties`` and so on; parameters are mergekit's own,
``None`` leaves its default. ``via`` says by which door: in memory, or the command line on files
(:mod:`benchmark.merging.mergekit_cli`). What comes back is checked before anybody sees it: every
key, shapes, dtypes, finite values, and for methods with a closed form one tensor against the
formula. Whatever fails becomes a MethodError with the tool's message, never a merge that seems to
protect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmark.api.contracts import Card, Knowledge, Setting
from benchmark.core.errors import MethodError, UsageError, first_line
from benchmark.core.state import State, compatible
from benchmark.io.folders import Checkpoint
from benchmark.merging import mergekit_cli
from benchmark.merging.folderwise import FolderMerger
from benchmark.merging.mergekit_cli import Request, refuse_unknown
from benchmark.merging.mergekit_formula import check
from benchmark.merging.tau import GridMerger, active, in_or_out

_INSTALL = "pip install 'unmergebench[mergekit]'"
#: Methods of two models of which one takes the part of the base.
_BETWEEN = ("slerp", "nearswap", "arcee_fusion")
#: Positions between two models; for nearswap a distance in weight space, so of a weight's size.
_POSITIONS = {
    "slerp": (0.2, 0.35, 0.5, 0.65, 0.8),
    "nearswap": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
_SYMMETRIC = ("slerp",)
#: With a base it fails on three or more task vectors of zero, as frozen tensors have.
_BASELESS = ("multislerp",)
BASE = "base"


@dataclass(frozen=True)
class MergeKit(GridMerger, FolderMerger):
    """One method of mergekit. Subclasses name it.

    Attributes:
        via: ``memory``, or ``command-line``: files and a program per merge (seconds each).
        density: share of entries kept (ties, dare, breadcrumbs, della).
        gamma: share of outliers dropped (breadcrumbs).
        epsilon: spread of the drop probability (della).
        normalize: divide by the sum of weights.
        rescale: rescale what was dropped to its norm before.
        scale: mergekit's ``lambda``.
        select_topk: share of entries kept by their variance (sce).
    """

    via: Literal["memory", "command-line"] = "memory"
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    scale: float | None = None
    select_topk: float | None = None

    method: ClassVar[str] = "task_arithmetic"
    stochastic: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        summary="mergekit",
        authors="Charles Goddard et al. (Arcee AI)",
        paper="Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        arxiv="2403.13257",
        fidelity="faithful",
        licence="LGPL-3.0 (the tool, used as a library)",
    )

    @property
    def outside(self) -> str:
        """The tool's version, on which results depend."""
        return mergekit_cli.version()

    def search_space(self, members: int) -> list[Setting]:
        """Weights as for every merger, where the method has them; else in or out, or a position.

        ``into``: which member takes the part of the base. Where weights are normalised only their
        ratios are tried, and ``lambda`` where the method has it.

        Raises:
            MethodError: the method does not merge so many.
        """
        spec = _method(self.method).spec
        least, most = _members(spec)
        if not least <= members <= most:
            wants = f"exactly {least}" if least == most else f"at least {least}"
            raise MethodError(
                f"mergekit's {self.method} takes {wants} of the models, not {members}"
            )
        if self.method in _BETWEEN:
            both = (1.0,) * members
            into = (0.0,) if self.method in _SYMMETRIC else (0.0, 1.0)
            positions = [{"t": t} for t in _POSITIONS.get(self.method, ())] or [{}]
            return [Setting(both, {"into": i, **position}) for i in into for position in positions]
        known = {parameter.name for parameter in spec.parameters}
        if "weight" in known:
            found = super().search_space(members)
            if self.fixed is None and self.per != "layer" and self._normalizes(spec):
                free = "lambda" in known and self.scale is None
                found = self.ratios(found, members, "lambda" if free else None)
        else:
            found = in_or_out(members)

        def enough(row: Sequence[float]) -> bool:
            return not any(row) or sum(c != 0 for c in row) >= least

        return [s for s in found if all(enough(row) for row in s.layers or (s.coefficients,))]

    def _normalizes(self, spec: Any) -> bool:
        default = {p.name: p.default for p in spec.parameters}
        if self.normalize is not None:
            return self.normalize
        return bool(default.get("normalize", default.get("normalize_weights", True)))

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        seed = self._seed(rng)

        def merged(setting: Setting) -> State:
            request = self.request(setting, len(experts))
            states = _models(request, base, experts)
            run = _in_memory if self.via == "memory" else mergekit_cli.merge_states
            return self._checked(run(request, states, seed), request, base, experts)

        return merged

    def merge_folders(
        self,
        base: Checkpoint,
        folders: Sequence[Path],
        experts: Sequence[State],
        setting: Setting,
        rng: torch.Generator,
    ) -> tuple[State, dict[str, Any]]:
        """On the folders' own files where ``via=command-line``."""
        if self.via == "memory":
            return self.merge(base.state, experts, setting, None, rng), {}
        if setting.layers:
            raise MethodError("coefficients by layer need via=memory")
        request = self.request(setting, len(experts))
        paths = _models(request, base.path, folders)
        found, record = mergekit_cli.merge_checkpoints(request, base, paths, self._seed(rng))
        return self._checked(found, request, base.state, experts), record

    def request(self, setting: Setting, members: int) -> Request:
        """What mergekit is asked for ``setting``.

        Raises:
            MethodError: a parameter the method does not have, or too few or many models.
        """
        spec = _method(self.method).spec
        chosen = self._options()
        parameters = {p.name: p for p in spec.parameters}
        chosen |= {key: v for key, v in setting.parameters.items() if key != "into"}
        refuse_unknown(set(chosen), set(parameters), self.method)
        each = {k: v for k, v in chosen.items() if parameters[k].scope.name != "SHARED"}
        kept = active(setting, members)
        least, most = _members(spec)
        if not least <= len(kept) <= most:
            raise MethodError(f"mergekit's {self.method} cannot merge {len(kept)} models")
        models = {f"m{i}": dict(each) for i, _ in kept}
        for i, coefficient in kept:
            for weight in parameters.keys() & {"weight", "scale"}:
                models[f"m{i}"][weight] = coefficient
        base: str | None = BASE
        if self.method in _BETWEEN:
            base = list(models)[int(setting.parameters.get("into", 0))]
        elif not _has_base(spec):
            base = None
        return Request(
            self.method, models, base, {k: v for k, v in chosen.items() if k not in each}
        )

    def _options(self) -> dict[str, object]:
        given = {
            "density": self.density,
            "gamma": self.gamma,
            "epsilon": self.epsilon,
            "normalize": self.normalize,
            "rescale": self.rescale,
            "lambda": self.scale,
            "select_topk": self.select_topk,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _checked(
        self, out: State, request: Request, base: State, experts: Sequence[State]
    ) -> State:
        out = {k: _narrow(v, base[k].dtype) if k in base else v for k, v in out.items()}
        compatible(out, base, f"mergekit's {self.method}")
        check(out, request, base, _models(request, base, experts))
        return {key: _whole(out[key]) for key in base}

    def _seed(self, rng: torch.Generator) -> int:
        return int(torch.randint(2**31, (), generator=rng)) if self.stochastic else 0


def _models(request: Request, base: Any, experts: Sequence[Any]) -> dict[str, Any]:
    """Name → what it stands for, for every model of the request."""
    found = {f"m{i}": expert for i, expert in enumerate(experts) if f"m{i}" in request.models}
    return {BASE: base, **found} if request.base == BASE else found


def _in_memory(request: Request, states: dict[str, State], seed: int) -> State:
    from mergekit.merge_methods import merge_state_dicts

    names = dict.fromkeys(key for own in request.models.values() for key in own)
    parameters: dict[str, Any] = dict(request.shared)
    for key in names:
        parameters[key] = {name: own[key] for name, own in request.models.items()}
    try:
        # The tool draws from the global generator; the caller's stays where it was.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            found: State = merge_state_dicts(
                states, request.method, parameters=parameters or None, base=request.base
            )
    except Exception as error:  # whatever the tool raises is its failure, not a defense
        raise MethodError(
            f"mergekit's {request.method}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return found


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Some methods answer half precision in float32, which the tool itself would write as half."""
    half = dtype in (torch.bfloat16, torch.float16) and value.dtype == torch.float32
    return value.to(dtype) if half else value


def _whole(value: Tensor) -> Tensor:
    """``value`` in memory of its own: the tool may give a part of a larger tensor."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _has_base(spec: Any) -> bool:
    """Whether the public base goes in, as the origin of task vectors."""
    return spec.contract.base.name != "IGNORED" and spec.name not in (*_BETWEEN, *_BASELESS)


def _members(spec: Any) -> tuple[int, float]:
    """The fewest and the most members the method merges, the public base not counted."""
    contract = spec.contract
    base = int(_has_base(spec))
    least = max(1, (contract.min_inputs or 0) - base, contract.min_non_base or 0)
    limits = [contract.max_non_base, contract.max_inputs and contract.max_inputs - base]
    return least, min((limit for limit in limits if limit is not None), default=float("inf"))


def _method(name: str) -> Any:
    try:
        from mergekit.merge_methods import get
    except ImportError:
        raise UsageError(f"mergekit is not installed: {_INSTALL}") from None
    return get(name)


def _named(method: str, unseen: str = "") -> type[MergeKit]:
    """``unseen``: of a method that draws, why a small model's merge does not show it."""
    card = Card(**{**vars(MergeKit.card), "summary": f"mergekit's {method}"})
    fields = {
        "method": method,
        "stochastic": bool(unseen),
        "card": card,
        "expected_failed_checks": {"seeded": unseen} if unseen else {},
        "__module__": __name__,
    }
    name = "".join(part.title() for part in method.split("_"))
    return dataclass(frozen=True)(type(name, (MergeKit,), {**fields, "__qualname__": name}))


_KEEPS = "its density is 1 unless set: nothing is dropped, whatever it draws"

Linear = _named("linear")
TaskArithmetic = _named("task_arithmetic")
Ties = _named("ties")
DareTies = _named("dare_ties", _KEEPS)
DareLinear = _named("dare_linear", _KEEPS)
Breadcrumbs = _named("breadcrumbs")
BreadcrumbsTies = _named("breadcrumbs_ties")
Della = _named("della", _KEEPS)
DellaLinear = _named("della_linear", _KEEPS)
Slerp = _named("slerp")
Nuslerp = _named("nuslerp")
Multislerp = _named("multislerp")
Karcher = _named("karcher")
ModelStock = _named("model_stock")
Sce = _named("sce")
Ram = _named("ram")
RamplusTl = _named("ramplus_tl")
Nearswap = _named("nearswap")
ArceeFusion = _named("arcee_fusion", "it draws entries of tensors with over a million only")
Passthrough = _named("passthrough")
