"""Tensors of a checkpoint folder → a model that runs them, and their in-memory names.

Which file name became which in-memory name is found by *tracing*: the model is loaded once more
from tensors that each hold their own number. So no table of transformers' renamings is kept here.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmark.core.errors import CheckpointError, brief
from benchmark.core.state import State, compatible

CLIP_CONFIG = "open_clip_config.json"
#: What wraps a model and its names.
_WRAPPERS = ("_orig_mod.", "module.", "model.")
#: ALBERT runs one layer up to so many times.
_SHARED = 64
_FIRST_TRACE = 2**20  # no buffer holds such a number; float32 is exact up to 2**24


def main_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The floating dtype most entries have."""
    sizes: Counter[torch.dtype] = Counter()
    for value in tensors.values():
        if value.is_floating_point():
            sizes[value.dtype] += value.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


class Piece(NamedTuple):
    """Where a tensor of a file is in memory: one or several tensors there, one above the other in
    the file, or a part of one (``box``: start and stop of every axis)."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...] = ()

    def read(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor as the file has it."""
        if self.box:
            part = state[self.keys[0]][tuple(slice(*ends) for ends in self.box)]
            return part.reshape(self.shape)
        parts = [state[key] for key in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Loaded(NamedTuple):
    """A model and its tensors: ``names``, in the file → in memory, the first where weights are
    tied; ``pieces``: those that are no tensor of their own in memory, or several."""

    model: nn.Module
    names: dict[str, str]
    pieces: dict[str, Piece]


def transformers_model(path: Path, tensors: State, like: nn.Module | None = None) -> Loaded:
    """The model of a transformers folder, and which of its tensors became which in memory.

    ``like``: a model whose architecture, head and all, is taken in place of the folder's own; what
    the tensors lack of its head stays as it is there.

    Raises:
        CheckpointError: the config or the tensors do not make a model.
    """
    with quiet():
        config, cls = _architecture(path) if like is None else _own(like)
        _check_depth(path, config, len(tensors))

        options: dict[str, Any] = {}

        def loaded(values: State, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
            return cls.from_pretrained(
                None,
                config=copy.deepcopy(config),  # loading edits it
                state_dict=dict(values),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # reported by us, in one line
                output_loading_info=True,
                **options,
            )

        try:
            model, info = loaded(tensors, main_dtype(tensors))
            wrapped = _wrapped(tensors) if info["missing_keys"] else ""
            if wrapped:
                tensors = {key.removeprefix(wrapped): value for key, value in tensors.items()}
                model, info = loaded(tensors, main_dtype(tensors))
            if info["missing_keys"] and all(k.startswith("pooler.") for k in info["missing_keys"]):
                options["add_pooling_layer"] = False  # a headed model's backbone, saved by itself
                model, info = loaded(tensors, main_dtype(tensors))
            if like is None:
                _check_loaded(path, cls.__name__, info)
            traced, _ = loaded(_numbered(tensors), torch.float32)
        except CheckpointError:
            raise
        # A configuration may hold anything, and transformers then raises anything.
        except Exception as error:
            raise CheckpointError(
                f"{path}: {cls.__name__} cannot be loaded: {brief(error)}"
            ) from error
    found = _match(model, traced, tensors)
    weights = model.state_dict()
    for name, piece in found.items():
        value = piece.read(weights)
        if not torch.equal(value, tensors[name].to(value.dtype)):
            raise CheckpointError(
                f"{path}: transformers does more than rename tensor {name!r} on load; "
                "such architectures are not supported"
            )
    used = {key for piece in found.values() for key in piece.keys}
    made_up = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for key, parameter in model.named_parameters():
        made = any(pattern.search(key) for pattern in made_up)  # Marian's positions
        if key not in used and not made and like is None:
            raise CheckpointError(f"{path} lacks tensor {key!r}, or stores it in several pieces")
        parameter.requires_grad_(False)
    plain = {n: p.keys[0] for n, p in found.items() if len(p.keys) == 1 and not p.box}
    return Loaded(
        model.eval(),
        {f"{wrapped}{name}": key for name, key in plain.items()},
        {f"{wrapped}{name}": piece for name, piece in found.items() if name not in plain},
    )


def _own(model: Any) -> tuple[Any, Any]:
    """Config and class of a loaded model."""
    return model.config, type(model)


def _wrapped(tensors: State) -> str:
    """What torch.compile, DataParallel or a trainer put before every name; empty if nothing."""
    prefix = ""
    while all(key.startswith(prefix) for key in tensors):
        found = next(
            (w for w in _WRAPPERS if all(key.startswith(f"{prefix}{w}") for key in tensors)), ""
        )
        if not found:
            return prefix
        prefix += found
    return prefix


def _check_depth(path: Path, config: Any, tensors: int) -> None:
    """Refuse what would take for ever to build: a layer has a tensor of its own, or shares all."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"):
        layers = getattr(config, name, None)
        if isinstance(layers, int) and layers > max(tensors, 1) * _SHARED:
            raise CheckpointError(
                f"{path}: its config asks for {layers} layers ({name}), of {tensors} tensors"
            )


def _architecture(path: Path) -> tuple[Any, Any]:
    """Config and model class: the one that config.architectures names, else the bare model."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    # A configuration may hold anything, and transformers then raises anything.
    except Exception as error:
        raise CheckpointError(f"cannot use {path / 'config.json'}: {brief(error)}") from None
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{path} is quantised; use its full-precision checkpoint")
    named = config.architectures if isinstance(config.architectures, list) else []
    for name in named:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return config, cls
    try:
        cls = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        wanted = ", ".join(map(str, named or [config.model_type]))
        raise CheckpointError(f"{path}: transformers has no class {wanted}; update it") from None
    return config, cls[0] if isinstance(cls, tuple) else cls


def _check_loaded(path: Path, cls: str, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} lacks tensor {missing[0]!r}{more}, which {cls} needs; "
            "correct 'architectures' in its config.json, or save the whole model"
        )
    if mismatched := sorted(info["mismatched_keys"], key=str):
        key, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{path}: tensor {key!r} has shape {tuple(found)}, its config says {tuple(wanted)}; "
            "correct config.json"
        )
    if info.get("error_msgs"):
        raise CheckpointError(f"{path}: {str(info['error_msgs'][0]).splitlines()[0]}")


def _numbered(tensors: State) -> State:
    """Tensors that hold their own number everywhere, and take no memory."""
    return {
        name: torch.full((), float(_FIRST_TRACE + number)).expand(value.shape)
        for number, (name, value) in enumerate(tensors.items())
    }


def _match(model: nn.Module, traced: nn.Module, tensors: State) -> dict[str, Piece]:
    """File name → where it is in memory; under its first name where weights are tied."""
    first: dict[int, str] = {}
    canonical = {
        key: first.setdefault(id(value), key)
        for key, value in model.state_dict(keep_vars=True).items()
    }
    files, found = list(tensors), dict[str, Piece]()
    for key, value in traced.state_dict().items():
        if not value.numel():
            continue
        low, high = (int(value.min()) - _FIRST_TRACE, int(value.max()) - _FIRST_TRACE)
        if not 0 <= low <= high < len(files):
            continue
        for number in [low] if low == high else (value.unique() - _FIRST_TRACE).int().tolist():
            name, box = files[number], () if low == high else _box(value, number)
            shape = tuple(tensors[name].shape)
            before = found.get(name, Piece((), shape))
            if canonical[key] not in before.keys:
                found[name] = Piece((*before.keys, canonical[key]), shape, box)
    return found


def _box(value: torch.Tensor, number: int) -> tuple[tuple[int, int], ...]:
    """The corners of the part of a traced tensor that came from one of the file."""
    where = (value == _FIRST_TRACE + number).nonzero()
    return tuple((int(axis.min()), int(axis.max()) + 1) for axis in where.unbind(1))


def open_clip_model(path: Path, tensors: State) -> Loaded:
    """The same for an open_clip folder, where both names are one."""
    import open_clip

    with quiet():
        try:
            model = open_clip.create_model(
                f"local-dir:{path}", load_weights=False, pretrained_text=False
            )
        except Exception as error:  # as above
            raise CheckpointError(f"cannot use {path / CLIP_CONFIG}: {brief(error)}") from None
    wanted = model.state_dict()
    reference = {  # the file's dtype is as good as the config's
        key: value.to(tensors[key].dtype) if key in tensors else value
        for key, value in wanted.items()
    }
    used = {key: value for key, value in tensors.items() if key in wanted}
    compatible(used, reference, str(path))
    # open_clip's own loader would convert legacy names; here the file must already have today's.
    model.load_state_dict(used)
    return Loaded(model.eval().requires_grad_(False), {key: key for key in used}, {})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of the libraries: ours say what is wrong."""
    import transformers.utils.logging as verbosity

    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    verbosity.set_verbosity_error()
    verbosity.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        verbosity.set_verbosity(level)
        if bars:
            verbosity.enable_progress_bar()
