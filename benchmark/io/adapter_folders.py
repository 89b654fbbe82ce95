"""LoRA adapters as folders in ``peft``'s format, read on their base.

    W = W0 + (alpha / r) · B·A        (/ √r with rslora)

Reading leaves the format (patterns, scaling, transposed weights, whole modules) to ``peft``: an
adapter becomes the State of its base with the update merged in, which is compared with what peft
itself runs. They are written by :mod:`benchmark.io.adapter_updates`.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.errors import CheckpointError, UsageError, brief
from benchmark.core.state import State, compatible, finite
from benchmark.io import folders, generator_loras, tensorfiles
from benchmark.io.folders import Checkpoint
from benchmark.io.inputs import outputs, valid_inputs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: Tasks whose head comes with an adapter → what loads a model with such a head.
_HEADED = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
#: What peft raises on a base or a configuration that it was not made for.
_PEFT = (
    RuntimeError, ValueError, KeyError, TypeError, ImportError, AttributeError, IndexError,
    re.error,
)  # fmt: skip
#: max relative |Δlogit| between an adapter beside its base and merged into it, in float32.
_SAME = 1e-3
# What peft reads but cannot merge into its base, or what makes the update no plain B·A.
_REFUSED = (
    "use_dora", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora",
    "use_bdlora", "kasa_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder on its base, or one of diffusers. ``state``: base and update, merged;
    ``config``: peft's, or None.

    ``whole``: names of the modules that it holds whole (``modules_to_save``: classifiers).
    """

    path: Path
    state: State
    config: Any
    whole: tuple[str, ...]

    def left_behind(self) -> list[Path]:
        """Files beside the adapter, which do not go along."""
        found = (file for file in self.path.rglob("*") if file.is_file())
        own = (CONFIG, WEIGHTS, generator_loras.WEIGHTS)
        return sorted(f.relative_to(self.path) for f in found if f.name not in own)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    if generator_loras.is_lora(path):
        return True
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
    if generator_loras.is_lora(path):
        if base.kind != "diffusers":
            raise CheckpointError(f"{path} is a LoRA of diffusers, {base.path} no model of it")
        return Adapter(path, generator_loras.merged(path, base), None, ())
    config = _config(path)
    if not (path / WEIGHTS).is_file():
        for file in sorted(path.glob("adapter_model.*")):
            if file.name.endswith(tensorfiles.PICKLES):
                raise tensorfiles.refuse_pickle(file)
    _, tensors = tensorfiles.read(path / WEIGHTS)
    finite(tensors, str(path))
    _check_head(path, config, tensors, base)
    model = copy.deepcopy(base.model).float()
    model.load_state_dict(base.state, strict=False)
    inputs = valid_inputs(base)
    with _in_memory_names(path, config, tensors, base) as (folder, config, tensors):
        try:
            adapted, whole = _adapted(path, folder, config, model, tensors, base)
            with torch.inference_mode():
                expected = outputs(adapted, inputs) if inputs else None
            merged = adapted.merge_and_unload().state_dict()
        except _PEFT as error:
            raise CheckpointError(f"{path} does not fit this base: {brief(error)}") from None
    state = {
        key: value if torch.equal(merged[key], value) else merged[key].detach()
        for key, value in base.state.items()
    }
    compatible(state, base.state, f"adapter {path} on its base")
    if expected is not None:
        _check_same(path, base, state, inputs, expected)
    return Adapter(path, state, config, whole)


def head_of(path: Path, base: Checkpoint) -> Checkpoint:
    """``base`` as a model of the task that the adapter in ``path`` was trained for, with a head of
    its number of labels, which the adapter brings.

    Raises:
        UsageError: the adapter names no such task.
        CheckpointError: ``base`` lacks more than the head.
    """
    import transformers

    config = _config(path)
    auto = getattr(transformers, _HEADED.get(str(config.task_type), ""), None)
    own: Any = getattr(base.model, "config", None)
    _, tensors = tensorfiles.read(path / WEIGHTS)
    heads = _whole(tensors)
    weights = [value for key, value in heads.items() if key.endswith(".weight")]
    if auto is None or own is None or not weights or type(own) not in auto._model_mapping:
        raise UsageError(f"--base-head expert: {path} brings no head of a task that is known here")
    wanted = copy.deepcopy(own)
    wanted.num_labels = len(weights[-1])
    model = auto._model_mapping[type(own)](wanted).eval().requires_grad_(False)
    found = folders.load(base.path, like=replace(base, model=model))
    fresh = model.state_dict()
    lacking = [key for key in fresh if key not in found.state and key not in heads]
    if lacking:
        raise CheckpointError(
            f"{base.path} lacks {lacking[0]!r}, which the adapter {path} does not bring either"
        )
    state = {
        key: found.state[key]
        if key in found.state and found.state[key].shape == value.shape
        else value.to(base.dtype)
        for key, value in fresh.items()
    }
    return replace(found, model=model, state=state)


def _whole(tensors: State) -> State:
    """What is no factor: the modules that are held whole, under the names of the base."""
    return {
        key.removeprefix(PREFIX): value for key, value in tensors.items() if ".lora_" not in key
    }


def _check_head(path: Path, config: Any, tensors: State, base: Checkpoint) -> None:
    """Refuse a base with another head than the adapter brings, with what to do about it."""
    if str(config.task_type) not in _HEADED:
        return
    for key, value in _whole(tensors).items():
        own = base.state.get(key)
        if own is None or own.shape != value.shape:
            raise CheckpointError(
                f"{path} brings a head for {config.task_type} ({key}) that the base "
                f"{base.path} has not; --base-head expert gives the base one"
            )


def _check_same(
    path: Path, base: Checkpoint, state: State, inputs: Mapping[str, Tensor], expected: Tensor
) -> None:
    """Raise unless base and update, as read, compute what peft itself runs."""
    with torch.inference_mode():
        found = outputs(base.model, inputs, state)
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= _SAME:
        raise CheckpointError(
            f"{path} computes something else under peft than its update does on the base (max "
            f"relative |Δlogit| {gap:.2g}); merge it into its base with peft first"
        )


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
                found = PeftConfig.from_pretrained(str(path))
                _check_types(found)
                return found
    except (OSError, RecursionError, *_PEFT) as error:
        raise CheckpointError(f"cannot use {path / CONFIG}: {brief(error)}") from None
    raise CheckpointError(
        f"{path / CONFIG} sets {refused[0]}, which is no plain B·A; "
        "merge the adapter into its base with peft first"
    )


def _check_types(config: Any) -> None:
    """Raise ValueError where peft would fail on a field, or take it for another."""
    patterns = (config.rank_pattern, config.alpha_pattern)
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError("rank_pattern and alpha_pattern are tables of names and numbers")
    numbers = [config.r, config.lora_alpha, *(n for pattern in patterns for n in pattern.values())]
    if not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        raise ValueError("r, lora_alpha and their patterns are positive numbers")
    if not isinstance(config.bias, str):
        raise ValueError(f"bias is 'none', 'all' or 'lora_only', not {config.bias!r}")


@contextmanager
def _in_memory_names(
    path: Path, config: Any, tensors: State, base: Checkpoint
) -> Iterator[tuple[Path, Any, State]]:
    """The adapter under the names of the loaded base, and the folder that holds it so.

    Transformers renames modules on load (``query`` became ``q_proj``), so an adapter trained before
    names modules that are only in its base's file.
    """
    modules = dict(base.model.named_modules())
    from peft.utils.other import get_pattern_key

    renamed = {}
    for key in tensors:
        module, found, _ = key.removeprefix(PREFIX).partition(".lora_")
        inside = base.names.get(f"{module}.weight", "").removesuffix(".weight")
        if found and module not in modules and inside in modules:
            renamed[module] = inside
    if not renamed:
        yield path, config, tensors
        return
    fresh = copy.deepcopy(config)
    fresh.target_modules = {renamed.get(m, m) for m in _targets(tensors)}
    for name, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        given = getattr(config, name)
        values = {m: given.get(get_pattern_key(given.keys(), m), default) for m in renamed}
        setattr(fresh, name, {renamed[m]: value for m, value in values.items()})
    moved = {}
    for key, value in tensors.items():
        module, found, rest = key.removeprefix(PREFIX).partition(".lora_")
        moved[f"{PREFIX}{renamed.get(module, module)}{found}{rest}"] = value
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder)
        tensorfiles.save(Path(folder) / WEIGHTS, moved, {"format": "pt"})
        yield Path(folder), fresh, moved


def _targets(tensors: State) -> set[str]:
    """The modules that have factors."""
    split = (key.removeprefix(PREFIX).partition(".lora_") for key in tensors)
    return {module for module, found, _ in split if found}


def _adapted(
    path: Path, folder: Path, config: Any, model: nn.Module, tensors: State, base: Checkpoint
) -> tuple[Any, tuple[str, ...]]:
    """peft's model of the adapter in ``folder``, and the modules that it replaces whole.

    Raises:
        CheckpointError: it is of another base, or trains one of two weights that the base ties.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.other import ModulesToSaveWrapper

    fresh: Any = copy.deepcopy(config)  # loading edits it
    fresh.inference_mode = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder), config=fresh)
        held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lacking = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    more = _of_the_base(path, tensors.keys() - held.keys(), tensors, base)
    if lacking or len(held) != len(tensors) - more:
        raise CheckpointError(
            f"{path} does not fit this base: its {len(tensors)} tensors are not the "
            f"{len(held)} that {CONFIG} asks for; give the base it was trained on"
        )
    whole = tuple(
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    owners = {name.rpartition(".")[0] for name in _tied(base.model)}
    if tied := sorted(owners & {*_targets(tensors), *whole}):
        raise CheckpointError(
            f"{path} trains {tied[0]}, whose weight this base ties to another layer's, and that "
            "would move along; save the base untied (tie_word_embeddings=false) and give that"
        )
    return adapted, whole


def _of_the_base(path: Path, names: Iterable[str], tensors: State, base: Checkpoint) -> int:
    """How many tensors are the base's own, which peft adds where an embedding is trained."""
    count = 0
    for name in names:
        key = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        known = base.state.get(key, base.model.state_dict().get(key))
        if known is not None and known.shape == tensors[name].shape:
            if not torch.equal(known.float(), tensors[name].float()):
                raise CheckpointError(
                    f"{path} holds another {key!r} than the base; give the base it was trained on"
                )
            count += 1
    return count


def _tied(model: nn.Module) -> set[str]:
    """Names of weights that are one tensor under several names."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}
