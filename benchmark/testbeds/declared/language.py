"""Language models: causal ones, and those of an encoder and a decoder.

Inputs say what is computed (:class:`LanguageBackbone`). All of it goes through one body, to which
a State is lent; only generation runs the whole model, head and all, by ``transformers`` itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.data import IGNORED
from benchmark.core.state import State
from benchmark.testbeds.declared.backbones import TextBackbone, token_rows
from benchmark.testbeds.declared.generation import Greedy, Signs
from benchmark.testbeds.declared.vocabulary import Vocabulary
from benchmark.testbeds.padding import chunks

# Logits over the vocabulary per pass, where their sum is all that is kept: 256 MiB of float32.
_LOGITS = 2**26
# How far a choice that an example lacks lies below the worst of its own.
_ABSENT = 20.0


@dataclass(frozen=True, eq=False)
class LanguageBackbone(TextBackbone):
    """A language model; what its features are depends on which inputs there are:

    | inputs beside ``input_ids`` and ``attention_mask`` (n, L) | ``forward`` gives |
    |---|---|
    | none | (n, d): unit features of a text, pooled |
    | ``places`` (n,) or (n, T) | (n, d) or (n, T, d): hidden states there, of any length |
    | ``wanted``, ``places`` (n, C, T), ``share`` (n, C); all else (n, C, L) | (n, C): ``share`` ·
      log p of the tokens ``wanted``, ``IGNORED`` behind them |
    | ``places``, ``room`` (n, T) | (n, T) int64: what greedy decoding gives |

    Where there is a decoder of its own, ``decoder_input_ids`` (n, T) come along, and places are
    in these. A choice without tokens is one that the example lacks: far below its worst.

    ``vocabulary``: the base's head. ``greedy``: the whole model. ``signs``: its special tokens.
    ``limit``: how many positions it has, if their number is fixed.
    """

    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(torch.empty(0, 0)))
    greedy: Greedy = field(default_factory=lambda: Greedy(nn.Identity(), "", {}))
    signs: Signs = field(default_factory=Signs)
    limit: int | None = None

    def forward(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        """As the table says; differentiable but for generated tokens."""
        if "room" in inputs:
            return self.greedy.tokens(state, inputs, self.signs)
        if "wanted" in inputs:
            return self._scores(state, inputs)
        if "places" in inputs:
            return self._hidden(state, inputs)
        return super().forward(state, inputs)

    @property
    def crossing(self) -> bool:
        """Whether it is an encoder and a decoder."""
        return self.signs.start is not None

    def _hidden(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        ids, mask, places = inputs["input_ids"], inputs["attention_mask"], inputs["places"]
        found, back = chunks(mask, token_rows(ids))
        parts = []
        for part in found:
            rows: dict[str, Any] = {
                "input_ids": ids[part.rows, : part.width],
                "attention_mask": mask[part.rows, : part.width],
            }
            if "decoder_input_ids" in inputs:
                rows["decoder_input_ids"] = inputs["decoder_input_ids"][part.rows]
            hidden = self.call(state, **rows, use_cache=False, **self.extra).last_hidden_state
            # Behind the end of an answer a place may be anywhere.
            at = places[part.rows].reshape(len(part.rows), -1, 1).clamp(max=hidden.shape[1] - 1)
            parts.append(hidden.gather(1, at.expand(-1, -1, hidden.shape[-1])))
        return torch.cat(parts)[back].reshape(*places.shape, -1)

    def _scores(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        wanted, share = inputs["wanted"], inputs["share"]
        flat = {key: v.flatten(0, 1) for key, v in inputs.items() if key != "share"}
        vocabulary = self._vocabulary_on(wanted.device)
        rows = max(1, _LOGITS // (len(vocabulary.head) * wanted.shape[-1]))
        parts = []
        for start in range(0, wanted.shape[0] * wanted.shape[1], rows):
            one = {key: value[start : start + rows] for key, value in flat.items()}
            parts.append(vocabulary.likelihoods(self._hidden(state, one), one["wanted"]))
        scores = torch.cat(parts).reshape(share.shape) * share
        there = (wanted != IGNORED).any(-1)
        worst = scores.detach().masked_fill(~there, float("inf")).amin(1, keepdim=True)
        return torch.where(there, scores, worst - _ABSENT)

    def _vocabulary_on(self, device: torch.device) -> Vocabulary:
        """The head, sent to a device once."""
        if device not in self._heads:
            self._heads[device] = self.vocabulary.to(device)
        return self._heads[device]

    @functools.cached_property
    def _heads(self) -> dict[torch.device, Vocabulary]:
        return {}
