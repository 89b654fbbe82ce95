"""What protect, attack and merge do with LoRA adapters: read beside models, written where asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.state import State, compatible
from benchmark.io import adapter_folders, adapter_updates, folders
from benchmark.io.adapter_folders import Adapter, is_adapter, lifted
from benchmark.io.fitting import check_fits
from benchmark.io.folders import Checkpoint, in_dtypes_of

#: Names of what is no head: layers, and embeddings.
_BODY = re.compile(r"(^|\.)(\d+|\w*embed\w*)\.")


@dataclass(frozen=True)
class Members:
    """The base and the members of one command.

    ``formats``: the folder whose format a member would be written in (an adapter's is the base);
    ``adapters``: None for a model. With an adapter among them, the States of ``origin`` and
    ``checkpoints`` are in float32, whatever is stored; so they are where members have other dtypes
    than the base, which ``lifted`` then says. ``lent``: the base has a head that is not in its
    folder, but in an adapter.
    """

    stored: Checkpoint
    origin: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    formats: tuple[Checkpoint, ...]
    adapters: tuple[Adapter | None, ...]
    lifted: str = ""
    lent: bool = False


def read(base: Path, members: Sequence[tuple[Path, str]], base_head: str | None = None) -> Members:
    """The base and (folder, role) members, models or adapters.

    ``base_head``: ``"expert"`` gives the base the head of the first member.

    Raises:
        CheckpointError: a folder cannot be read, or does not fit the base.
        UsageError: another ``base_head``, or one where it can do nothing.
    """
    found = [None if is_adapter(path) else folders.load(path) for path, _ in members]
    stored = folders.load(base)
    if base_head is not None:
        stored = _with_head(stored, found[0], members[0][0], base_head)
    _check_not_zero(stored)
    loaded = [model for model in found if model is not None]
    for model, (path, role) in zip(found, members, strict=True):
        if model is not None:
            _check_heads(model, stored, role, path)
    mixed = [model for model in loaded if _dtypes(model) != _dtypes(stored)]
    lift = bool(mixed) or None in found
    origin = lifted(stored) if lift else stored
    checkpoints: list[Checkpoint] = []
    formats: list[Checkpoint] = []
    adapters: list[Adapter | None] = []
    for model, (path, role) in zip(found, members, strict=True):
        if model is None:
            adapters.append(adapter := adapter_folders.load(path, origin))
            formats.append(stored)
            checkpoints.append(replace(origin, path=path, state=adapter.state))
        else:
            alike = in_dtypes_of(model, stored)
            compatible(alike.state, stored.state, f"{role} {path}")
            check_fits(alike, stored, role)
            adapters.append(None)
            formats.append(alike)
            checkpoints.append(lifted(model) if lift else model)
    said = f"{_named(mixed[0])} beside a base in {_named(stored)}" if mixed else ""
    lent = base_head is not None and found[0] is None
    return Members(stored, origin, tuple(checkpoints), tuple(formats), tuple(adapters), said, lent)


def _with_head(
    base: Checkpoint, expert: Checkpoint | None, path: Path, base_head: str
) -> Checkpoint:
    if base_head != "expert":
        raise UsageError(f"--base-head is 'expert' (the expert's own head), not {base_head!r}")
    if expert is None:
        return adapter_folders.head_of(path, base)
    if expert.kind != "transformers":
        raise UsageError("--base-head expert needs models of transformers")
    read = folders.load(base.path, like=expert)
    state = {}
    for key, value in expert.state.items():
        own = read.state.get(key)
        if own is not None and own.shape == value.shape:
            state[key] = own
        elif _BODY.search(key):
            raise CheckpointError(
                f"{base.path} lacks {key!r} of {expert.path}, which is no head: it is another model"
            )
        else:
            state[key] = value
    return replace(read, state=state, model=expert.model)


def _check_heads(model: Checkpoint, base: Checkpoint, role: str, path: Path) -> None:
    """Refuse another head with what to do about it."""
    prefix = f"{getattr(model.model, 'base_model_prefix', '')}."
    inside = {key.removeprefix(prefix) for key in model.state}
    bare = all(key in inside or key.startswith("pooler.") for key in base.state)
    more = inside - base.state.keys()
    if bare and more and not any(_BODY.search(key) for key in more):
        raise CheckpointError(
            f"{role} {path} has a head and the base {base.path} has none; --base-head expert gives "
            "the base the expert's"
        )
    keys = model.state.keys() ^ base.state.keys()
    keys |= {k for k in model.state.keys() & base.state.keys()
             if model.state[k].shape != base.state[k].shape}  # fmt: skip
    if not keys or any(_BODY.search(key) for key in keys):
        return  # not the head alone, or a bare model whose every name differs
    raise CheckpointError(
        f"{role} {path} and the base have different heads ({min(keys)}); "
        "--base-head expert gives the base the expert's"
    )


def _check_not_zero(base: Checkpoint) -> None:
    if not any(bool(value.any()) for value in base.state.values()):
        raise CheckpointError(f"{base.path} holds nothing but zeros; copy the base again")


def _dtypes(checkpoint: Checkpoint) -> dict[str, object]:
    return {key: value.dtype for key, value in checkpoint.state.items()}


def _named(checkpoint: Checkpoint) -> str:
    return str(checkpoint.dtype).removeprefix("torch.")


def check(adapter: bool | None, rank: int | None) -> None:
    """Raise UsageError for a rank without an adapter to have it."""
    if rank is not None and adapter is False:
        raise UsageError("--rank is that of an adapter; leave out --no-adapter")


def write(
    state: State,
    members: Members,
    like: Checkpoint,
    written_by: Sequence[int],
    out: Path,
    *,
    adapter: bool | None,
    rank: int | None,
    force: bool,
    sources: Sequence[Path],
) -> dict[str, Any]:
    """Write a result, and say how: as an adapter, or as a whole model in the format of ``like``.

    ``written_by``: the members whose kind decides where ``adapter`` is None.

    Raises:
        UsageError: an adapter is asked for and cannot hold the result.
    """
    given = [found for i in written_by if (found := members.adapters[i]) is not None]
    automatic = adapter is None and len(given) == len(written_by)
    state = {key: value.cpu() for key, value in state.items()}
    why = ""
    if adapter or automatic:
        whole = tuple(dict.fromkeys(name for found in given for name in found.whole))
        try:
            update = adapter_updates.factored(state, members.origin, rank, whole)
        except UsageError as error:
            if adapter or rank is not None:
                raise
            why = str(error).split(";")[0]
        else:
            if adapter or rank is not None or update.saves:
                first = given[0] if given else None
                adapter_updates.save(
                    update, members.stored, out, like=first, force=force, sources=sources
                )
                left = first.left_behind() if first else []
                return {
                    "format": "adapter",
                    "rank": update.rank,
                    "relative_error": update.error,
                    "left_behind": [str(file) for file in left],
                }
            why = f"an adapter of rank {update.rank} would be larger than the weights it changes"
    elif rank is not None:
        raise UsageError("--rank is that of an adapter; add --adapter to write one")
    if members.lent:
        raise UsageError(
            "the base's folder has no place for the adapter's head, so that only an adapter can be "
            f"written: {why or 'leave out --no-adapter'}"
        )
    # A model is written in its own precision, whatever was computed in.
    fitting = {key: value.to(like.state[key].dtype) for key, value in state.items()}
    folders.save(fitting, like, out, force=force, sources=sources)
    return {
        "format": "model",
        **({"lifted": members.lifted} if members.lifted else {}),
        **({"not_an_adapter": why} if why else {}),
        "left_behind": [str(file) for file in like.left_behind()],
    }
