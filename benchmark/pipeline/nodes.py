"""Nodes of a plan: what is made once, and known by its key before it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.api.contracts import Members
from benchmark.core.state import ForeignState, State, digest
from benchmark.pipeline.store import Store


@dataclass
class Report:
    """What the making of a node took, and what its method reported."""

    seconds: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)


class Node:
    """The members of a merge; of an expert or a release only ``released`` matters.

    ``key``: that of everything that determines it (:mod:`benchmark.pipeline.identity`). ``make``
    runs only when a result that needs the node is not in the store. ``durable``: its State is worth
    keeping on disk. ``inputs`` are made first, so that its seconds are its own.
    """

    def __init__(
        self,
        key: str,
        make: Callable[[Report], Members],
        store: Store,
        base: State,
        *,
        durable: bool = False,
        inputs: Sequence[Node] = (),
    ) -> None:
        self.key = key
        self._make, self._store, self._base = make, store, base
        self._durable, self._inputs = durable, inputs
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """``seconds``, ``notes`` and ``budget`` of its making; sha256 of ``base``, ``released`` and
        each of ``partners``; ``foreign``: whether code of its own runs it.
        """
        if self._facts is None:
            self._facts = self._store.get(f"facts:{self.key}")
        if self._facts is None:
            self._facts = self._described(self.members())
            self._store.put(f"facts:{self.key}", self._facts)
        return self._facts

    def known(self, sha256: str) -> Node:
        """Itself, of one State that cost nothing and has this hash."""
        self._facts = {**vars(Report()), "base": sha256, "released": sha256, "foreign": False}
        return self

    @property
    def sha256(self) -> str:
        """Of the tensors of the State."""
        return str(self.facts["released"])

    @property
    def identity(self) -> str:
        """What its outcomes are filed under (:mod:`benchmark.pipeline.identity`)."""
        return f"run by its own code: {self.key}" if self.facts["foreign"] else self.sha256

    def state(self) -> State:
        return self.members().released

    def members(self) -> Members:
        """Base, State and partners; made again if they fell out of memory."""
        found: Members | None = self._store.remembered(self.key)
        if found is None:
            for node in self._inputs:
                node.members()
            if self._durable:
                with self._store.claimed(self.key, self._base) as slot:
                    kept = slot.read()
                    if kept is None:
                        kept = self._timed().released
                        slot.write(kept)
                found = Members(self._base, kept, ())
            else:
                found = self._timed()
            self._store.remember(self.key, found)
        return found

    def _timed(self) -> Members:
        report = Report()
        start = time.perf_counter()
        made = self._make(report)
        report.seconds = time.perf_counter() - start
        self._store.forget_training(self.key)
        # Before a State is stored: one that is found on disk is not made again. The first making
        # counts: what fell out of memory is made again with part of the work already done.
        if self._store.get(f"report:{self.key}") is None:
            self._store.put(f"report:{self.key}", vars(report))
        return made

    def _described(self, made: Members) -> dict[str, Any]:
        known = {}
        for node in self._inputs:
            theirs = node.members()
            known[id(theirs.base)], known[id(theirs.released)] = node.facts["base"], node.sha256

        def hashed(state: State) -> str:
            return known.get(id(state)) or digest(state)

        return {
            **vars(Report()),
            **(self._store.get(f"report:{self.key}") or {}),
            "base": hashed(made.base),
            "released": hashed(made.released),
            "partners": [hashed(partner) for partner in made.partners],
            "foreign": isinstance(made.released, ForeignState),
        }
