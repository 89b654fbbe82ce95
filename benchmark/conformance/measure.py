"""Memory and draws of a call, seen from torch's dispatcher: no sampling, the same on every run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Follows every tensor that a torch operation returns while the block runs.

    ``live``: bytes of such tensors that are alive now, on any device (storages, so that views count
    once); ``peak``: the most there were at once. Scratch memory inside one operation, and arrays of
    numpy and scipy, are not seen. ``draws``: whether torch drew a random number, from whatever
    generator. An operation that may draw (attention with dropout) and did not leaves it as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.draws = False
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._follow(value, counted=False)  # unknown so far: it was there before the block
        may_draw = not self.draws and torch.Tag.nondeterministic_seeded in func.tags
        generators = _generators(args, kwargs) if may_draw else []
        before = [generator.get_state() for generator in generators]
        out = func(*args, **kwargs)
        self.draws |= any(
            not torch.equal(generator.get_state(), state)
            for generator, state in zip(generators, before, strict=True)
        )
        for value in tree_leaves(out):
            self._follow(value, counted=True)
        return out

    def _follow(self, value: Any, *, counted: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        identity, size = storage._cdata, storage.nbytes() if counted else 0
        if identity in self._known:
            return

        def gone(_: object) -> None:
            self.live -= size
            self._known.pop(identity, None)  # another storage may get the same address

        self._known[identity] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _generators(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Generator]:
    """Those that an operation draws from: the one it is given, or those of torch itself."""
    given = [g for g in (*args, *kwargs.values()) if isinstance(g, torch.Generator)]
    return given or [torch.default_generator, *torch.cuda.default_generators]


@contextmanager
def optimizer_steps() -> Iterator[list[str]]:
    """The steps that torch optimizers take meanwhile, as the names of their classes."""
    seen: list[str] = []

    def note(optimizer: Any, *_: object) -> None:
        seen.append(type(optimizer).__name__)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
