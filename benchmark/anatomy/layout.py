"""Writing down which units lie along which axes of a convolutional tower.

    layout = Layout(state, "visual.")
    layout.conv("conv1", out="stem")             # dim 0 of the weight, and the bias
    layout.norm("bn1", "stem", power=1)          # gains, biases, running statistics
    layout.conv("layer1.0.conv1", out="layer1.0.1", into="stem")
    layout.channels(fixed="layer4", relu=...)    # one Channels per name used

Names alone prove nothing (a block may hold a squeeze-and-excitation or a grouped convolution that
the row does not know), so a tensor of the tower that nobody wrote down is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from benchmark.anatomy.blocks import Axis, Channels, Linear, MLPBlock, Slot
from benchmark.core.errors import UsageError

Power = Literal[-1, 0, 1]


class Layout:
    """The axes of the tower below ``prefix``, by the name of the units that lie along them.

    A name of units is local to the tower; None stands for what cannot be renamed (pixels, outputs).
    """

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix
        self._axes: defaultdict[str, list[Axis]] = defaultdict(list)
        self._seen: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the tower has a layer ``name`` with a weight."""
        return f"{self.prefix}{name}.weight" in self.state

    def vector(self, key: str, units: str | None, power: Power = 0, dim: int = 0) -> None:
        """One tensor, if the tower has it."""
        self._note(f"{self.prefix}{key}", units, dim, power)

    def norm(self, name: str, units: str | None, power: Power = 0) -> None:
        """LayerNorm, BatchNorm with its running statistics, or GRN: one number per channel.

        ``power`` is that of gain and bias: what the norm gives is scaled, not what it is given.
        """
        for part in ("weight", "bias"):
            self._note(f"{self.prefix}{name}.{part}", units, -1, power)
        for part in ("running_mean", "running_var"):
            self._note(f"{self.prefix}{name}.{part}", units, 0, 0)
        self._seen.add(f"{self.prefix}{name}.num_batches_tracked")

    def batch_norm(self, name: str, units: str, power: Power = 0) -> None:
        """:meth:`norm` that must be a BatchNorm: a GroupNorm would bind channels to their groups.

        Raises:
            UsageError: it has no running statistics.
        """
        key = f"{self.prefix}{name}.running_var"
        if key not in self.state:
            raise UsageError(
                f"a ResNet without tensor {key!r} is not supported: of its norms only BatchNorm "
                "lets channels trade places"
            )
        self.norm(name, units, power)

    def conv(self, name: str, out: str | None, into: str | None = None, power: Power = 0) -> None:
        """A convolution or Linear: ``out`` along dim 0 and the bias, ``into`` along dim 1.

        ``power`` is that of the columns. A depthwise convolution has no ``into``: its only input
        channel is the output's own.

        Raises:
            UsageError: a grouped convolution, whose channels trade places inside their group only.
        """
        key = f"{self.prefix}{name}.weight"
        if into is not None and (width := self._width(into)) != (given := self._columns(key)):
            raise UsageError(
                f"{key!r} reads {given} of {width} channels; grouped convolutions are not supported"
            )
        self._note(key, out, 0, 0)
        self._note(key, into, 1, power)
        self._note(f"{self.prefix}{name}.bias", out, 0, 0)

    def reader(self, name: str, units: str, mixed: bool = False) -> None:
        """A layer, by its full name, whose inputs are ``units`` and whose outputs stay, or
        (``mixed``) belong to heads."""
        tower, self.prefix = self.prefix, ""
        try:
            self.conv(name, None, units)
        finally:
            self.prefix = tower
        if mixed:
            self._axes[units][-1] = replace(self._axes[units][-1], mixed=True)

    def mlp(self, up: str, down: str, stream: str, activation: str) -> MLPBlock:
        """Two Linears around an activation: an MLP block, whose ends lie along ``stream``."""
        linears = [Linear.named(f"{self.prefix}{name}", self.state) for name in (up, down)]
        self.conv(up, None, stream)
        self.conv(down, stream)
        return MLPBlock(up=linears[0], down=linears[1], activation=activation)

    def channels(self, fixed: Collection[str], relu: Collection[str] = ()) -> list[Channels]:
        """One entry per name, without those in ``fixed``; ``relu`` may be scaled as well.

        Raises:
            UsageError: the tower has a tensor that was not written down, or lacks one that was.
        """
        strange = [k for k in self.state if k.startswith(self.prefix) and k not in self._seen]
        if strange:
            more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
            raise UsageError(
                f"the channels that tensor {strange[0]!r}{more} acts on are not known; "
                "extend its row in benchmark/anatomy/convolutional.py"
            )
        return [
            Channels(f"{self.prefix}{name}", tuple(axes), relu=name in relu)
            for name, axes in self._axes.items()
            if name not in fixed
        ]

    def _note(self, key: str, units: str | None, dim: int, power: Power) -> None:
        if key not in self.state:
            return
        self._seen.add(key)
        if units is not None:
            self._axes[units].append(Axis(Slot(key), dim % self.state[key].ndim, power))

    def _width(self, units: str) -> int:
        return self._axes[units][0].read(self.state).shape[0]

    def _columns(self, key: str) -> int:
        if key not in self.state:
            raise UsageError(f"a convolutional tower without tensor {key!r} is not supported")
        return self.state[key].shape[1]
