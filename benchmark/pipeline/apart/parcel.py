"""All that the process of a defense is given of a testbed: what the owner of one expert has."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Arena, Testbed, Victim
from benchmark.api.recipe import Recipe
from benchmark.core.data import Task
from benchmark.core.errors import UnmergeBenchError, UsageError, first_line
from benchmark.core.state import State


@dataclass(frozen=True)
class Parcel:
    """The owner's side. ``released``: what ``protect`` gave, where ``shipped`` is asked.

    ``content``: the testbed's hash, by which a training knows its resume file. Written by the
    parent and read by the child, never the other way: reading it runs what it says.
    """

    base: State
    expert: State
    task: Task
    arena: Arena
    anatomy: Anatomy
    recipe: Recipe
    content: str
    threads: int | None
    released: State | None = None

    @classmethod
    def of(cls, testbed: Testbed, victim: Victim, released: State | None = None) -> Parcel:
        return cls(
            base=victim.base,
            expert=victim.expert,
            task=victim.task.without_test(),
            arena=testbed.arena(),
            anatomy=victim.anatomy,
            recipe=victim.recipe,
            content=testbed.content_hash(),
            threads=testbed.threads,
            released=None if released is None else dict(released),
        )

    @property
    def device(self) -> torch.device:
        return next(iter(self.base.values())).device

    def write(self, path: Path) -> None:
        """Tensors that two States share are written, and read, as one.

        Raises:
            UsageError: the testbed's model does not pickle.
            UnmergeBenchError: the disk is full.
        """
        try:
            torch.save(self, path)
        except RuntimeError as error:  # torch's word for a full disk
            raise UnmergeBenchError(
                f"cannot write {path} ({first_line(error)}); free some space, or name another "
                "folder in TMPDIR"
            ) from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"this testbed's model cannot be sent to a process of its own "
                f"({first_line(error)}); give the testbed an arena() that pickles"
            ) from error

    @staticmethod
    def read(path: Path) -> Parcel:
        return cast(Parcel, torch.load(path, mmap=True, weights_only=False))
