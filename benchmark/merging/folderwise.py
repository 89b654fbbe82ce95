"""Mergers that want the checkpoint folders themselves, not only what they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Access, Knowledge, Merger, Setting
from benchmark.core.state import State, with_variances
from benchmark.io.folders import Checkpoint


class FolderMerger(ABC):
    """A merger that ``unmergebench merge`` hands the folders, such as an outside program."""

    @abstractmethod
    def merge_folders(
        self,
        base: Checkpoint,
        folders: Sequence[Path],
        experts: Sequence[State],
        setting: Setting,
        rng: torch.Generator,
    ) -> tuple[State, dict[str, Any]]:
        """The merged State under the names of ``base.state``, and how it was made (JSON values).

        ``experts`` are the States in ``folders``, in the same order.

        Raises:
            MethodError: the merge failed, or its result is not what was asked for.
        """


def merge_folders(
    merger: Merger,
    base: Checkpoint,
    folders: Sequence[Path],
    experts: Sequence[State],
    setting: Setting,
    rng: torch.Generator,
) -> tuple[State, dict[str, Any]]:
    """Merge by whichever of its two doors ``merger`` has; arguments and result as in
    :meth:`FolderMerger.merge_folders`.
    """
    if isinstance(merger, FolderMerger):
        return merger.merge_folders(base, folders, experts, setting, rng)
    knowledge = None
    if merger.reads_anatomy:
        knowledge = Knowledge(Access.WEIGHTS, base.state, experts, Anatomy.of(base.model))
    return with_variances(merger.merge(base.state, experts, setting, knowledge, rng)), {}
