"""The anatomy of one model: its blocks and channels, read from the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from benchmark.anatomy.blocks import AttentionBlock, Channels, Gauge, MLPBlock
from benchmark.anatomy.families.find import find
from benchmark.core.errors import MethodError

_FREEDOM: tuple[Gauge, ...] = ("sign", "rotary", "general")


@dataclass(frozen=True)
class Anatomy:
    """Where the blocks of one model are.

    Attributes:
        family: the table rows it was read from.
        uncovered: keys of attention, MLP and convolution weights that no row answers for.
        partial: whether a method may go on without these.
        rows: of each attention, the name of the row it was read from.
        tied: names that are one tensor in the model, of which a State may lack all but one.
    """

    family: str
    attention: tuple[AttentionBlock, ...]
    mlp: tuple[MLPBlock, ...]
    channels: tuple[Channels, ...] = ()
    uncovered: tuple[str, ...] = ()
    partial: bool = False
    tied: tuple[tuple[str, ...], ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def units(self) -> tuple[MLPBlock | Channels, ...]:
        """Everything whose units can be renamed: hidden units of MLPs, then channels."""
        return (*self.mlp, *self.channels)

    def attended(self, method: str) -> tuple[AttentionBlock, ...]:
        """The attention blocks, for a method that is nothing without them.

        Raises:
            MethodError: the model has none.
        """
        if not self.attention:
            raise MethodError(
                f"{method} acts on attention, and {self.family} has none; "
                "use a defense of another kind (params permutes channels, trap2 trains)"
            )
        return self.attention

    @property
    def qk_gauge(self) -> Gauge:
        """The Q/K gauge group that every attention block allows."""
        found = [block.qk_gauge for block in self.attention]
        return min(found, key=_FREEDOM.index, default="general")

    @property
    def left_out(self) -> str:
        """What no row answers for, in words; empty where that is nothing."""
        if not self.uncovered:
            return ""
        more = f" and {len(self.uncovered) - 1} more" if len(self.uncovered) > 1 else ""
        return f"no row of the anatomy covers {self.uncovered[0]}{more}"

    def handed(
        self, role: Literal["defense", "attack"], note: Callable[[str, Any], None]
    ) -> Anatomy:
        """What a method is given: where not all is covered, one that is heard or refuses when the
        method looks at the blocks. A method that never does treats the whole model."""
        if not self.uncovered:
            return self
        look = _Look(role, self.left_out, self.partial, note)
        return _Partial(**_plain(self), look=look)

    @staticmethod
    def of(model: torch.nn.Module) -> Anatomy:
        """The anatomy of a loaded model (transformers or open_clip).

        Raises:
            UsageError: no row of :mod:`benchmark.anatomy.families` fits the model's names.
        """
        return Anatomy(**find(model)._asdict())


def _plain(anatomy: Anatomy) -> dict[str, Any]:
    return {f.name: object.__getattribute__(anatomy, f.name) for f in fields(Anatomy)}


@dataclass(frozen=True)
class _Look:
    """What happens when a method looks at the blocks of a model that are not all."""

    role: str
    left_out: str
    partial: bool
    note: Callable[[str, Any], None]

    def __call__(self) -> None:
        if not self.partial:
            raise MethodError(
                f"{self.left_out}; go on without with --partial (a testbed.toml: partial = true)"
            )
        self.note(f"{self.role}.partly-covered", self.left_out)


@dataclass(frozen=True)
class _Partial(Anatomy):
    """The anatomy of a model of which a part is not covered, in the hands of a method."""

    look: _Look = field(kw_only=True)

    def __getattribute__(self, name: str) -> Any:
        if name in ("attention", "mlp", "channels"):
            object.__getattribute__(self, "look")()
        return object.__getattribute__(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Anatomy, tuple(_plain(self).values())
