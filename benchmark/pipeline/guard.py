"""Nothing that methods are handed may change: not the base, not an expert of anybody.

A defense that spoils the base spoils every merge, and would seem to protect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from benchmark.core.errors import Tampered
from benchmark.core.state import State


class _Watched(NamedTuple):
    state: State
    hashes: dict[str, int]
    versions: dict[str, int]


class Guard:
    """Watches States: by a hash of every bit after a method's work, and by torch's own count of
    in-place changes after each merge, which is many times as often.
    """

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}

    def watch(self, name: str, state: State) -> None:
        """Keep an eye on ``state``, as it is now; what was watched under the name is let go."""
        known = self._watched.get(name)
        if known is None or known.state is not state:
            self._watched[name] = _Watched(state, _hashes(state), _versions(state))

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Around the work of a method.

        Raises:
            Tampered: ``what`` changed a State that is watched.
        """
        yield
        self.check(what)

    def check(self, what: str, *, whole: bool = True) -> None:
        """Raise Tampered if a watched State is not what it was; ``whole``: look at every bit."""
        for name, watched in self._watched.items():
            before, now = (
                (watched.hashes, _hashes(watched.state))
                if whole
                else (watched.versions, _versions(watched.state))
            )
            if before != now:
                key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
                raise Tampered(f"{what} changed {name} in place (tensor {key!r})")

    def clear(self) -> None:
        """Let go of everything."""
        self._watched.clear()


def _hashes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """A hash of each tensor's bits, fast enough to be taken after every node."""
    return {
        key: xxhash.xxh3_64_intdigest(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        for key, value in state.items()
    }


def _versions(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How often torch changed each tensor in place (inference tensors are not counted)."""
    return {key: 0 if value.is_inference() else value._version for key, value in state.items()}
