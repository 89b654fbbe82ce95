"""What protect, attack and merge do with LoRA adapters: read beside models, written where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.core.errors import UsageError
from benchmark.core.state import State, compatible
from benchmark.io import adapter_folders, folders
from benchmark.io.adapter_folders import Adapter
from benchmark.io.folders import Checkpoint


@dataclass(frozen=True)
class Members:
    """The base and the members of one command.

    ``formats``: the folder whose format a member would be written in (an adapter's is the base);
    ``adapters``: None for a model. With an adapter among them, the States of ``origin`` and
    ``checkpoints`` are in float32, whatever is stored.
    """

    stored: Checkpoint
    origin: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    formats: tuple[Checkpoint, ...]
    adapters: tuple[Adapter | None, ...]


def read(base: Path, members: Sequence[tuple[Path, str]]) -> Members:
    """The base and (folder, role) members, models or adapters.

    Raises:
        CheckpointError: a folder cannot be read, or does not fit the base.
    """
    stored = folders.load(base)
    lift = any(adapter_folders.is_adapter(path) for path, _ in members)
    origin = adapter_folders.lifted(stored) if lift else stored
    checkpoints: list[Checkpoint] = []
    formats: list[Checkpoint] = []
    adapters: list[Adapter | None] = []
    for path, role in members:
        if adapter_folders.is_adapter(path):
            adapters.append(adapter := adapter_folders.load(path, origin))
            formats.append(stored)
            checkpoints.append(replace(origin, path=path, state=adapter.state))
        else:
            loaded = folders.load(path)
            compatible(loaded.state, stored.state, f"{role} {path}")
            adapters.append(None)
            formats.append(loaded)
            checkpoints.append(adapter_folders.lifted(loaded) if lift else loaded)
    return Members(stored, origin, tuple(checkpoints), tuple(formats), tuple(adapters))


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
            update = adapter_folders.factored(state, members.origin, rank, whole)
        except UsageError as error:
            if adapter or rank is not None:
                raise
            why = str(error).split(";")[0]
        else:
            if adapter or rank is not None or update.saves:
                first = given[0] if given else None
                adapter_folders.save(
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
    # A model is written in its own precision, whatever was computed in.
    fitting = {key: value.to(like.state[key].dtype) for key, value in state.items()}
    folders.save(fitting, like, out, force=force, sources=sources)
    return {
        "format": "model",
        **({"not_an_adapter": why} if why else {}),
        "left_behind": [str(file) for file in like.left_behind()],
    }
