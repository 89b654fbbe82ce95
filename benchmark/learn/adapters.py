"""LoRA adapters on the attention blocks of any architecture, through ``peft``.

    W = W0 + (alpha / r) · B·A        B (out, r) starts at zero, A (r, in) as peft draws it

The adapters live on the Linear slots of :mod:`benchmark.anatomy`, so that fused QKV and transposed
weights need nothing of their own, and are embedded in the State: the forward pass is unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmark.api.recipe import Lora
from benchmark.core.errors import MethodError
from benchmark.core.state import State

if TYPE_CHECKING:
    from benchmark.anatomy import Anatomy, Slot

_ADAPTER = "default"


class Adapters:
    """The adapters of one training run on ``start``; ``frozen`` name prefixes get none.

    ``parameters``: A and B of every adapted slot, (r, in) and (out, r), on the device of its
    weight. Deterministic under ``rng``; torch's global generator is left as it was.

    Raises:
        MethodError: the architecture has no attention weight to adapt.
    """

    def __init__(
        self,
        start: State,
        anatomy: Anatomy,
        lora: Lora,
        frozen: tuple[str, ...],
        rng: torch.Generator,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.start = start
        self.slots: list[Slot] = [
            block.linears()[target].weight
            for block in anatomy.attention
            for target in lora.targets
            if not block.linears()[target].weight.key.startswith(frozen)
        ]
        if not self.slots:
            raise MethodError(f"LoRA finds no attention weight to train in {anatomy.family}")
        layers = torch.nn.ModuleDict()
        for index, slot in enumerate(self.slots):
            weight = slot.read(start)
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)  # a view, no copy
            layers[f"slot{index}"] = layer
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(layers),
        )
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, layers, adapter_name=_ADAPTER)
        self._layers: list[Any] = [layers[f"slot{index}"] for index in range(len(self.slots))]
        self.parameters: dict[str, Tensor] = {
            name: value for name, value in layers.named_parameters() if value.requires_grad
        }

    def state(self) -> State:
        """``start`` with the adapters embedded; differentiable in ``parameters``."""
        out = dict(self.start)
        for slot, layer in zip(self.slots, self._layers, strict=True):
            slot.write(out, slot.read(out) + layer.get_delta_weight(_ADAPTER))
        return out
