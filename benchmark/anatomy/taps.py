"""Watch or replace what flows through the Linears of a module while it runs.

    with watch(module, keys, see):          # see(key, inputs) at every call
        features(state, inputs)

    with replace(module, {block: fn}):      # fn(up, gate) enters ``down``
        features(state, inputs)

    with follow(module, {key: fn}):         # fn(inputs, output) is what the Linear gives
        features(state, inputs)

A Linear is named by the key of its weight in a State, as in :class:`benchmark.anatomy.Slot`. Hooks
sit on the module, so they also see States that ``torch.func.functional_call`` lends it; they are
removed when the block ends, however it ends. One module is watched by one thread at a time.

Rows are tokens as the module computes them, in an order of its own. Most padding never gets there
(the features of `minilm` sort texts by length and cut every chunk to its longest), but shorter rows
of a chunk keep their padding, and those rows are seen like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.anatomy.blocks import Linear, MLPBlock
from benchmark.anatomy.families.loose import EXPERTS
from benchmark.core.errors import MethodError

#: (output of up, output of gate or None), each (..., n) → what enters down, or None to leave it.
Hidden = Callable[[Tensor, Tensor | None], Tensor | None]

#: (inputs, output) of a Linear → the output it gives instead.
After = Callable[[Tensor, Tensor], Tensor]


def owner(module: nn.Module, key: str) -> nn.Module:
    """The submodule that is called with the inputs of the weight ``key``.

    Raises:
        MethodError: no submodule has it, or the one that does is never called
            (:func:`watchable`).
    """
    path, _, name = key.rpartition(".")
    try:
        found = module.get_submodule(path)
    except AttributeError:
        found = None
    if found is None or not hasattr(found, name):
        raise MethodError(f"{type(module).__name__} has no tensor {key!r} to watch the inputs of")
    if found.__class__.__name__ in EXPERTS:
        raise MethodError(
            f"the inputs of {key!r} cannot be watched: it holds many experts' weights"
        )
    if _inside_attention(module, path):
        raise MethodError(
            f"the inputs of {key!r} cannot be watched: nn.MultiheadAttention uses that tensor "
            "without calling the module that holds it; leave the Linear out (taps.watchable)"
        )
    return found


def watchable(module: nn.Module, key: str) -> bool:
    """Whether the owner of ``key`` is called (open_clip's ``attn.out_proj`` is not)."""
    return not _inside_attention(module, key.rpartition(".")[0])


@contextmanager
def watch(
    module: nn.Module, keys: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(key, inputs)`` when the owner of ``key`` runs. ``inputs``: (rows, d), detached.

    Raises:
        MethodError: see :func:`owner`.
    """
    with ExitStack() as stack:
        for key in dict.fromkeys(keys):

            def hook(_: nn.Module, args: tuple[Any, ...], key: str = key) -> None:
                see(key, args[0].detach().flatten(0, -2))

            stack.callback(owner(module, key).register_forward_pre_hook(hook).remove)
        yield


class Record(dict[str, Tensor]):
    """Key → all inputs seen, (rows, d); filled when :func:`record` ends."""

    def __missing__(self, key: str) -> Tensor:
        raise MethodError(f"no inputs of {key!r} were recorded: its module did not run")


@contextmanager
def record(module: nn.Module, keys: Iterable[str]) -> Iterator[Record]:
    """Keep the inputs of each weight of ``keys``. For sums over many rows :func:`watch` is smaller.

    Raises:
        MethodError: see :func:`owner`; also when a key is read whose module did not run.
    """
    parts: dict[str, list[Tensor]] = {}
    found = Record()
    with watch(module, keys, lambda key, rows: parts.setdefault(key, []).append(rows)):
        yield found
    found.update({key: torch.cat(rows) for key, rows in parts.items()})


@contextmanager
def follow(module: nn.Module, after: Mapping[str, After]) -> Iterator[None]:
    """Let ``after[key](inputs, output)`` be the output of the owner of ``key``.

    Both are as the module sees them: (..., d) and (..., n), biases included; rows of a fused weight
    come together.

    Raises:
        MethodError: see :func:`owner`.
    """
    with ExitStack() as stack:
        for key, function in after.items():

            def hook(
                _: nn.Module, args: tuple[Any, ...], output: Tensor, function: After = function
            ) -> Tensor:
                return function(args[0], output)

            stack.callback(owner(module, key).register_forward_hook(hook).remove)
        yield


@contextmanager
def replace(module: nn.Module, hidden: Mapping[MLPBlock, Hidden]) -> Iterator[None]:
    """Let ``hidden[block](up, gate)`` enter ``down`` of each block instead of what the module made.

    ``up`` and ``gate`` are the outputs of these Linears, (..., n), biases included; ``gate`` is
    None where the block has none. A function that returns None only watches. What stands between
    the activation and ``down`` (dropout, which does nothing in evaluation) is replaced as well.

    Raises:
        MethodError: see :func:`owner`.
    """
    with ExitStack() as stack:
        for block, function in hidden.items():
            if block.norm:
                raise MethodError(f"{block.down.weight.key}: a norm stands before it")
            if block.down.weight.columns is not None:
                raise MethodError(f"{block.down.weight.key}: what attention gives enters it too")
            for handle in _replace(module, block, function):
                stack.callback(handle.remove)
        yield


def _replace(module: nn.Module, block: MLPBlock, function: Hidden) -> Iterator[Any]:
    made: dict[str, Tensor] = {}

    def keep(name: str, linear: Linear) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            made[name] = linear.weight.cut(output, -1)

        return owner(module, linear.weight.key).register_forward_hook(hook)

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Popped: nothing of the pass may outlive it.
        fresh = function(made.pop("up"), made.pop("gate", None))
        return None if fresh is None else (fresh, *args[1:])

    yield keep("up", block.up)
    if block.gate is not None:
        yield keep("gate", block.gate)
    # First of its hooks: whoever watches ``down`` must see what really enters it.
    yield owner(module, block.down.weight.key).register_forward_pre_hook(enter, prepend=True)


def _inside_attention(module: nn.Module, path: str) -> bool:
    """Whether the submodule at ``path`` is the output projection of an nn.MultiheadAttention."""
    parent, _, name = path.rpartition(".")
    try:
        return name == "out_proj" and isinstance(
            module.get_submodule(parent), nn.MultiheadAttention
        )
    except AttributeError:
        return False
