"""Texts that a language model writes: greedy decoding by ``transformers``, and what is right."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.data import IGNORED, Ask, Split
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.testbeds.declared.extraction import extracted


@dataclass(frozen=True)
class Signs:
    """Token ids: ``stop`` ends a text, ``pad`` stands behind it; ``start`` opens a decoder's."""

    stop: int = 0
    pad: int = 0
    start: int | None = None


class _Generating(nn.Module):
    """Makes ``generate`` the forward pass, for which alone a State can be lent."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole: Any = whole

    def forward(self, **inputs: Any) -> Tensor:
        found: Tensor = self.whole.generate(**inputs)
        return found


@dataclass(frozen=True, eq=False)
class Greedy:
    """The whole model, head and all, on the meta device.

    ``prefix``: what the body's names begin with in it. ``outside``: its tensors that are in no
    State (the base's head, buffers), by name.
    """

    whole: nn.Module
    prefix: str
    outside: Mapping[str, Tensor]

    def call(self, module: nn.Module, state: State, inputs: Mapping[str, Any], name: str) -> Any:
        """One call of ``module``, in which the whole model is called ``name``."""
        device = next(iter(state.values())).device
        if device not in self._lent:
            self._lent[device] = {k: v.to(device) for k, v in self.outside.items()}
        lent = {f"{name}{key}": value for key, value in self._lent[device].items()}
        lent |= {f"{name}{self.prefix}{key}": value for key, value in state.items()}
        return torch.func.functional_call(module, lent, kwargs=dict(inputs))

    @functools.cached_property
    def _lent(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}

    def logits(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, T, vocabulary) as the release gives them."""
        found: Tensor = self.call(self.whole, state, inputs, "").logits
        return found

    def tokens(self, state: State, inputs: Mapping[str, Tensor], signs: Signs) -> Tensor:
        """What follows each prompt, (n, T) int64 for ``room`` (n, T), ``pad`` behind its end.

        Prompts are padded on the right as everywhere, and here moved to the right for a decoder
        alone: what is written stands right behind them, and each one's positions begin at 0.
        """
        from transformers import GenerationConfig

        ids, mask, room = inputs["input_ids"], inputs["attention_mask"], inputs["room"]
        if signs.start is None:
            ids, mask = _on_the_left(ids, mask)
        # Greedy and nothing else, whatever penalties the release's own configuration asks for.
        wanted = GenerationConfig(
            max_new_tokens=room.shape[1],
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=signs.stop,
            pad_token_id=signs.pad,
            decoder_start_token_id=signs.start,
        )
        given = {"input_ids": ids, "attention_mask": mask, "generation_config": wanted}
        found: Tensor = self.call(_Generating(self.whole), state, given, "whole.")
        written = found[:, ids.shape[1] if signs.start is None else 1 :]
        missing = room.shape[1] - written.shape[1]
        return nn.functional.pad(written, (0, missing), value=signs.pad)


def _on_the_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padding on the right → on the left."""
    width = mask.shape[1]
    shift = width - mask.sum(1, keepdim=True)
    at = (torch.arange(width, device=ids.device)[None] - shift) % width
    return ids.gather(1, at), mask.gather(1, at)


@dataclass(frozen=True)
class Written:
    """Right is an example in whose generated text ``how`` finds what it finds in the answer.

    ``tokenizer`` reads tokens; ``stop`` ends a text; ``longest``: tokens that are written at most.
    """

    tokenizer: Any
    how: str
    stop: int
    longest: int

    def __call__(self, ask: Ask, batch: Split) -> Tensor:
        """(n,) bool, on the device of the labels.

        Raises:
            MethodError: the State's own forward pass gives no tokens (it mixes several outputs).
        """
        room = batch.labels.new_zeros(len(batch), self.longest)
        tokens = ask({**batch.inputs, "room": room})
        if tokens.is_floating_point() or tokens.shape != room.shape:
            raise MethodError("a model that mixes outputs of several does not generate texts")
        said, wanted = self.texts(tokens), self.texts(batch.labels)
        right = [
            (found := extracted(text, self.how)) is not None
            and found == extracted(answer, self.how)
            for text, answer in zip(said, wanted, strict=True)
        ]
        return torch.tensor(right, device=batch.labels.device)

    def texts(self, tokens: Tensor) -> list[str]:
        """(n, T) → texts, each up to its end."""
        rows = []
        for row in tokens.tolist():
            end = next((i for i, t in enumerate(row) if t in (self.stop, IGNORED)), len(row))
            rows.append(row[:end])
        found: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return found
