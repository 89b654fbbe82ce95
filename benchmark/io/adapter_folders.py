"""LoRA adapters as folders in ``peft``'s format: read on their base, written as factors of τ.

    W = W0 + (alpha / r) · B·A        (/ √r with rslora)

Reading leaves the format (patterns, scaling, transposed weights, whole modules) to ``peft``: an
adapter becomes the State of its base with the update merged in. Writing factors the update of each
weight matrix, by default at the rank that loses nothing but float32's rounding. Whatever an adapter
cannot hold is refused: nothing is lost silently.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.errors import CheckpointError, UsageError, first_line
from benchmark.core.lowrank import Factors, rounding, thin_svd
from benchmark.core.state import State, compatible, finite, norm, task_vector
from benchmark.io import folders, tensorfiles
from benchmark.io.folders import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft reads but cannot merge into its base, or what makes the update no plain B·A.
_REFUSED = (
    "use_dora", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora",
    "use_bdlora", "kasa_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder on its base. ``state``: base and update, merged; ``config``: peft's.

    ``whole``: names of the modules that it holds whole (``modules_to_save``: classifiers).
    """

    path: Path
    state: State
    config: Any
    whole: tuple[str, ...]

    def left_behind(self) -> list[Path]:
        """Files beside the adapter, which do not go along."""
        found = (file for file in self.path.rglob("*") if file.is_file())
        return sorted(f.relative_to(self.path) for f in found if f.name not in (CONFIG, WEIGHTS))


@dataclass(frozen=True)
class Update:
    """A task vector as an adapter. ``factors``: module → U, S, Vᵀ of its (out, in) update;
    ``whole``: module → its own tensors. ``error``: ‖τ − B·A‖ / ‖τ‖ over all tensors.
    """

    factors: dict[str, Factors]
    whole: dict[str, State]
    transposed: bool
    error: float

    @property
    def rank(self) -> int:
        """The largest rank of any module; all are written at it."""
        return max((len(s) for _, s, _ in self.factors.values()), default=0)

    @property
    def saves(self) -> bool:
        """Whether the factors are smaller than the matrices."""
        pairs = [(len(u), v.shape[1]) for u, _, v in self.factors.values()]
        return self.rank * sum(n + m for n, m in pairs) < sum(n * m for n, m in pairs)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (path / CONFIG).is_file() and not any((path / c).is_file() for c in folders.CONFIGS)


def lifted(base: Checkpoint) -> Checkpoint:
    """``base`` with half precision as float32, in which updates are not rounded away."""
    state = {
        key: value.float() if value.is_floating_point() and value.element_size() < 4 else value
        for key, value in base.state.items()
    }
    return replace(base, state=state)


def load(path: Path, base: Checkpoint) -> Adapter:
    """Read the adapter in ``path`` on ``base`` (:func:`lifted`).

    Raises:
        CheckpointError: unreadable, pickled, not finite, not LoRA, or not an adapter of this base.
    """
    config = _config(path)
    if not (path / WEIGHTS).is_file():
        for file in sorted(path.glob("adapter_model.*")):
            if file.name.endswith(tensorfiles.PICKLES):
                raise tensorfiles.refuse_pickle(file)
    _, tensors = tensorfiles.read(path / WEIGHTS)
    finite(tensors, str(path))
    model = copy.deepcopy(base.model).float()
    model.load_state_dict(base.state, strict=False)
    merged, whole = _merged(path, config, model, tensors)
    state = {
        key: value if torch.equal(merged[key], value) else merged[key].detach()
        for key, value in base.state.items()
    }
    compatible(state, base.state, f"adapter {path} on its base")
    return Adapter(path, state, config, whole)


def _config(path: Path) -> Any:
    from peft import PeftConfig

    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = raw["peft_type"]
        if kind != "LORA":
            raise CheckpointError(
                f"{path} is a {kind} adapter; only LoRA is read: merge it into its base first"
            )
        refused = [name for name in _REFUSED if raw.get(name)]
        if not refused:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot use {path / CONFIG}: {first_line(error)}") from None
    raise CheckpointError(
        f"{path / CONFIG} sets {refused[0]}, which is no plain B·A; "
        "merge the adapter into its base with peft first"
    )


def _merged(
    path: Path, config: Any, model: nn.Module, tensors: State
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The weights of ``model`` with the adapter merged in, and the modules it replaces whole."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.other import ModulesToSaveWrapper

    fresh: Any = copy.deepcopy(config)  # loading edits it
    fresh.inference_mode = True
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(path), config=fresh)
        held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        lacking = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
        if lacking or len(held) != len(tensors):
            raise CheckpointError(
                f"{path} does not fit this base: its {len(tensors)} tensors are not the "
                f"{len(held)} that {CONFIG} asks for; give the base it was trained on"
            )
        whole = tuple(
            name.removeprefix("base_model.model.")
            for name, module in adapted.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        )
        plain: Any = adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"{path} does not fit this base: {first_line(error)}") from None
    return plain.state_dict(), whole


def factored(
    state: State, base: Checkpoint, rank: int | None = None, whole: Sequence[str] = ()
) -> Update:
    """``state`` as an update of ``base``, of at most ``rank`` where given.

    ``whole``: modules that are stored whole instead of as factors.

    Raises:
        UsageError: something moved that no adapter can hold.
    """
    from transformers.pytorch_utils import Conv1D

    compatible(state, base.state, "the model to be written")
    modules = dict(base.model.named_modules())
    tau = task_vector(state, base.state)
    factors: dict[str, Factors] = {}
    kept: dict[str, State] = {}
    transposed: set[bool] = set()
    lost = 0.0
    for key, delta in tau.items():
        name, _, kind = key.rpartition(".")
        module = modules[name]
        owner = next((w for w in whole if name == w or name.startswith(f"{w}.")), None)
        if owner is not None:
            prefix = f"{owner}."
            kept[owner] = {k: v for k, v in state.items() if k.startswith(prefix)}
            continue
        if kind != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            raise UsageError(
                f"the result also changes {key}, which a LoRA adapter cannot hold; "
                "add --no-adapter to write the whole model"
            )
        conv = isinstance(module, Conv1D)
        floor = rounding(state[key], base.state[key])
        matrix = delta.T if conv else delta  # Conv1D holds (in, out)
        u, s, v = thin_svd(matrix, floor)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        lost += float((matrix.double() - (u * s) @ v).square().sum())
        if len(s):
            factors[name] = u, s, v
            transposed.add(conv)
    if len(transposed) > 1:
        raise UsageError(
            "the result changes Linear and Conv1D weights, which one LoRA adapter cannot hold; "
            "add --no-adapter to write the whole model"
        )
    if not factors:
        raise UsageError(
            "the result does not differ from the base in any weight an adapter can hold; "
            "add --no-adapter to write the whole model"
        )
    return Update(factors, kept, transposed == {True}, lost**0.5 / norm(tau))


def save(
    update: Update,
    base: Checkpoint,
    out: Path,
    *,
    like: Adapter | None = None,
    force: bool = False,
    sources: Sequence[Path] = (),
) -> None:
    """Write ``update`` as a PEFT folder: float32, alpha = r, one rank for all modules.

    The base's name and the task are those of ``like``. The folder appears whole or not at all.
    """
    from peft import LoraConfig

    rank = update.rank
    named = like.config if like else None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(update.factors),
        modules_to_save=sorted(update.whole) or None,
        fan_in_fan_out=update.transposed,
        task_type=named.task_type if named else None,
        base_model_name_or_path=named.base_model_name_or_path if named else str(base.path.name),
        inference_mode=True,
    )
    tensors = {}
    for name, (u, s, v) in update.factors.items():
        a, b = s.sqrt()[:, None] * v, u * s.sqrt()
        empty = rank - len(s)
        pair = {"A": nn.functional.pad(a, (0, 0, 0, empty)), "B": nn.functional.pad(b, (0, empty))}
        for letter, value in pair.items():
            key = f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = value.float().cpu().contiguous()
    for held in update.whole.values():
        tensors.update({f"base_model.model.{k}": v.cpu().contiguous() for k, v in held.items()})
    with folders.replacing(out, [base.path, *sources], force) as temporary:
        config.save_pretrained(str(temporary))
        tensorfiles.save(temporary / WEIGHTS, tensors, {"format": "pt"})
