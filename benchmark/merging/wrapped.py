"""Mergers that an attack uses in its own way (:meth:`benchmark.api.contracts.Attack.merging`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmark.api.contracts import Access, Attack, Card, Knowledge, Merger, Setting
from benchmark.core.state import State
from benchmark.merging.tau import PreparedMerger


class WrappedMerger(PreparedMerger):
    """A merger that an attack uses in its own way. Override what differs from ``inner``."""

    def __init__(self, inner: Merger, attack: Attack) -> None:
        self.inner = inner
        self.attack = attack

    @property
    def parts(self) -> tuple[Attack, Merger]:
        """What its results depend on."""
        return self.attack, self.inner

    @property
    def card(self) -> Card:  # type: ignore[override]
        return self.inner.card

    @property
    def access(self) -> Access:  # type: ignore[override]
        return self.inner.access

    @property
    def task_aware(self) -> bool:  # type: ignore[override]
        return self.inner.task_aware

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.inner.stochastic

    @property
    def reads_anatomy(self) -> bool:  # type: ignore[override]
        return self.inner.reads_anatomy

    def search_space(self, members: int) -> list[Setting]:
        return self.inner.search_space(members)

    def prepare(
        self,
        base: State,
        experts: Sequence[State],
        knowledge: Knowledge | None,
        rng: torch.Generator,
    ) -> Callable[[Setting], State]:
        return self.inner.prepare(base, experts, knowledge, rng)
