"""Checkpoint folders in and out: transformers (``config.json``), open_clip and diffusers.

A State lives under the in-memory names of the loaded model; transformers 5 renames modules on load
(METHODS section 4, "Names"), so a folder is written back under the names it came with, shard by
shard.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.outputs import MARKER, check_ours, recover, replacing_folder
from benchmark.core.state import State, compatible, finite
from benchmark.io import pipelines, tensorfiles
from benchmark.io.loaders import (
    CLIP_CONFIG,
    Piece,
    main_dtype,
    open_clip_model,
    transformers_model,
)
from benchmark.io.tensorfiles import TensorFile

_HF = "model.safetensors"
_LISTS = ".index.json"  # behind the name of the weights, where they lie in shards
_CLIP = "open_clip_model.safetensors"
CONFIGS = ("config.json", CLIP_CONFIG, pipelines.INDEX)
_ADAPTERS = ("adapter_config.json", pipelines.LORA)
# Weights in another format would release the unprotected expert beside the protected one.
_WEIGHTS = (
    *tensorfiles.PICKLES, ".safetensors", ".safetensors.index.json", ".bin.index.json", ".onnx",
    ".onnx_data", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".npz", ".npy",
)  # fmt: skip
#: What a loader might be told to run.
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll")
#: What belongs to a checkpoint where nobody wrote down who made it.
_PART = re.compile(
    r"(model|open_clip_model|adapter_model|diffusion_pytorch_model|pytorch_lora_weights)\S*"
    r"\.safetensors(\.index\.json)?|\w*config\.json|"
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template)\S*"
)
_INDICES = (f"{_HF}{_LISTS}", f"{pipelines.WEIGHTS}{_LISTS}")
_SMALL = 64 * 2**20

Kind = Literal["transformers", "open_clip", "diffusers"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder.

    ``model`` runs any State of the architecture (``torch.func.functional_call``). ``names``: name
    in the file → name in ``state``; tied weights have one in-memory name, the first.
    ``pieces``: those of the file that are several tensors in memory, or a part of one.
    ``extra``: tensors of the file that the model does not use, written back as they came.
    ``inner``: the part of a pipeline that the model is, a folder in ``path``; else nothing.
    """

    path: Path
    kind: Kind
    model: nn.Module
    state: State
    names: dict[str, str]
    files: tuple[TensorFile, ...]
    extra: State
    pieces: dict[str, Piece] = field(default_factory=dict)
    inner: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype most of the tensors have."""
        return main_dtype(self.state)

    @property
    def shards(self) -> int:
        """Number of safetensors files."""
        return len(self.files)

    def carried(self) -> list[Path]:
        """Small files that go along (config, tokenizer, ...), relative to the folder; of a pipeline
        all its other parts."""
        return [file for file in files_below(self.path) if self._carries(file)]

    def left_behind(self) -> list[Path]:
        """Files that never go along: pickles, weights in other formats, anything over 64 MiB."""
        weights = {file.name for file in self.files}
        own = {*weights, MARKER}
        return [f for f in files_below(self.path) if not self._carries(f) and str(f) not in own]

    def _carries(self, file: Path) -> bool:
        if str(file) == MARKER:
            return False
        if file.parent == Path(self.inner) and file.name in _INDICES:
            return self.shards > 1 or f"{self.files[0].name}{_LISTS}" != str(file)
        further = {*pipelines.parts_of(self.path)} - {self.inner} if self.inner else set()
        if file.parts[0] in further and file.name.endswith((".safetensors", _LISTS)):
            return True
        small = (self.path / file).stat().st_size <= _SMALL
        return small and not file.name.endswith((*_WEIGHTS, *_CODE))


def load(path: Path | str, like: Checkpoint | None = None) -> Checkpoint:
    """Read a checkpoint folder.

    ``like``: a loaded transformers folder whose architecture, head and all, is taken in place of
    the folder's own. What the folder lacks of the head is that of ``like``.

    Raises:
        CheckpointError: not a folder, no config, weights missing, pickled, cut short, incomplete,
            of the wrong shape, or not finite.
    """
    path = Path(path)
    _check_folder(path)
    kind, inner, shards = _found(path)
    files, tensors = [], State()
    for shard in shards:
        layout, part = tensorfiles.read(path / inner / shard)
        if twice := tensors.keys() & part.keys():
            raise CheckpointError(f"{path}: tensor {min(twice)!r} is in two shards; save it again")
        files.append(replace(layout, name=f"{inner}/{shard}" if inner else shard))
        tensors.update(part)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; save the model again")
    finite(tensors, str(path))
    if kind == "transformers":
        model, names, pieces = transformers_model(
            path, tensors, None if like is None else like.model
        )
    elif kind == "diffusers":
        model, names, pieces = pipelines.model(path / inner, tensors)
    else:
        model, names, pieces = open_clip_model(path, tensors)
    order = {key: position for position, key in enumerate(model.state_dict())}
    by_key = {names[name]: tensors[name] for name in reversed(tensors) if name in names}
    weights = model.state_dict()
    by_key |= {key: weights[key].clone() for piece in pieces.values() for key in piece.keys}
    state = {key: by_key[key] for key in sorted(by_key, key=order.__getitem__)}
    known = names.keys() | pieces.keys()
    extra = {name: value for name, value in tensors.items() if name not in known}
    return Checkpoint(path, kind, model, state, names, tuple(files), extra, pieces, inner)


def _found(path: Path) -> tuple[Kind, str, list[str]]:
    """The kind of a folder, where its model lies in it, and the files of its weights there.

    Raises:
        CheckpointError: there are none that can be read.
    """
    inner = pipelines.denoiser(path)
    kind: Kind = "transformers" if inner is None else "diffusers"
    name = _HF if inner is None else pipelines.WEIGHTS
    at = path / (inner or "")
    if (at / "config.json").is_file():
        if (at / name).is_file():
            return kind, inner or "", [name]
        if (at / f"{name}{_LISTS}").is_file():
            return kind, inner or "", _shards(at / f"{name}{_LISTS}")
    elif (at / CLIP_CONFIG).is_file() and (at / _CLIP).is_file():
        return "open_clip", "", [_CLIP]
    raise _no_weights(at, name if (at / "config.json").is_file() else _CLIP)


def save(
    state: Mapping[str, torch.Tensor],
    like: Checkpoint,
    out: Path | str,
    *,
    force: bool = False,
    sources: Sequence[Path] = (),
) -> None:
    """Write ``state`` as a folder in the format, names, dtypes and shards of ``like``.

    The folder appears whole or not at all. ``force`` replaces an existing checkpoint folder.

    Raises:
        CheckpointError: ``state`` does not fit ``like``.
        UsageError: ``out`` cannot be written to (:func:`check_out`).
    """
    out = Path(out)
    compatible(state, like.state, "the model to be written")
    with replacing(out, [like.path, *sources], force) as temporary:
        for file in like.carried():
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(like.path / file, temporary / file)
        _rewrite_configs(temporary / like.inner, like.dtype)
        for layout in like.files:
            tensors = {name: _stored(name, state, like) for name in layout.names}
            tensorfiles.write(temporary / layout.name, layout, tensors)


def _stored(name: str, state: Mapping[str, torch.Tensor], like: Checkpoint) -> torch.Tensor:
    """A tensor of the file."""
    if name in like.pieces:
        return like.pieces[name].read(state)
    return state[like.names[name]] if name in like.names else like.extra[name]


def _rewrite_configs(folder: Path, dtype: torch.dtype) -> None:
    """Leave out what names code (``auto_map``), and name the dtype that is written."""
    for file in folder.glob("*config.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict):
            continue
        changed = {key: value for key, value in content.items() if key != "auto_map"}
        for name in ("dtype", "torch_dtype"):
            if isinstance(content.get(name), str):
                changed[name] = str(dtype).removeprefix("torch.")
        if changed != content:
            file.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def in_dtypes_of(member: Checkpoint, base: Checkpoint) -> Checkpoint:
    """``member`` with every tensor in the dtype that ``base`` has it in."""
    state = {
        key: value.to(base.state[key].dtype) if key in base.state else value
        for key, value in member.state.items()
    }
    return replace(member, state=state)


def check_out(out: Path, sources: Sequence[Path], force: bool) -> None:
    """Raise UsageError unless a result may be written to the folder ``out``.

    It must not hold, or lie in, a folder that was read; if it exists and is not empty, it must be a
    checkpoint, and ``force`` given.
    """
    here = out.resolve()
    for source in (s.resolve() for s in sources):
        if here == source or here in source.parents or source in here.parents:
            raise UsageError(f"--out {out} overlaps the input {source}; choose another folder")
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"--out {out} is not a folder; choose another name")
    if not any(out.iterdir()):
        return
    if not any((out / config).is_file() for config in (*CONFIGS, *_ADAPTERS)):
        raise UsageError(f"--out {out} holds other files; choose an empty or a new folder")
    if not force:
        raise UsageError(f"--out {out} already holds a checkpoint; add --force to replace it")
    check_ours(out, [file.name for file in out.iterdir() if _PART.fullmatch(file.name)])


@contextmanager
def replacing(out: Path, sources: Sequence[Path], force: bool) -> Iterator[Path]:
    """A folder to write to that takes the place of ``out``, whole, on success."""
    recover(out)
    check_out(out, sources, force)
    with replacing_folder(out) as made:
        yield made
        check_out(out, sources, force)


def _check_folder(path: Path) -> None:
    if path.is_file():
        if path.name.endswith(tensorfiles.PICKLES):
            raise tensorfiles.refuse_pickle(path)
        raise CheckpointError(
            f"{path} is a file; give the folder that holds it and its config.json"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"no such folder: {path}; fetch a hub model with 'hf download ID --local-dir DIR'"
        )
    if not any((path / name).is_file() for name in CONFIGS):
        inside = sorted(f for name in (*CONFIGS, *_ADAPTERS) for f in path.glob(f"*/{name}"))
        if any((path / name).is_file() for name in _ADAPTERS):
            remedy = "it is an adapter: give its base where a base is asked for"
        elif inside:
            remedy = f"give the folder inside it that has one: {inside[0].parent}"
        else:
            remedy = "add the model's config.json"
        raise CheckpointError(f"{path} has no config.json (nor {CLIP_CONFIG}); {remedy}")


def _no_weights(path: Path, wanted: str) -> CheckpointError:
    present = sorted(p for p in path.iterdir() if p.is_file())
    for file in present:
        if file.name.endswith(tensorfiles.PICKLES):
            return tensorfiles.refuse_pickle(file)
    other = [p.name for p in present if p.suffix == ".safetensors"]
    found = f" (only {', '.join(other)})" if other else ""
    return CheckpointError(
        f"{path} has no {wanted}{found}; copy or rename the weights to that name"
    )


def _shards(index: Path) -> list[str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(listed), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} has no readable weight_map; copy it again") from None
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} points to {name!r}, not to a safetensors file beside it"
            )
    return names


def files_below(path: Path) -> list[Path]:
    """Every file below ``path`` but in hidden folders (.git, .cache), relative and sorted."""
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith((".", "__pycache__"))]
        found += [(Path(folder) / file).relative_to(path) for file in files]
    return sorted(file for file in found if (path / file).is_file())
