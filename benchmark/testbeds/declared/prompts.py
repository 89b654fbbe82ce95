"""Rows → token ids of prompts and of what is to follow them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.core.errors import UsageError, first_line
from benchmark.testbeds.declared.schema import TaskSpec

Ids = list[int]


@dataclass(frozen=True)
class Writer:
    """``tokens``: the most of a prompt, whose end is kept; None: all of it. ``crossing``: a decoder
    of its own reads the answer, which then begins a text."""

    spec: TaskSpec
    tokenizer: Any
    tokens: int | None
    crossing: bool

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The prompts.

        Raises:
            UsageError: a prompt is no text; the template does not fit a row; there is no chat
            template.
        """
        texts = [self._filled(row) for row in rows]
        if not self.spec.chat:
            return texts
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"task {self.spec.name}: chat = true, but the base's tokenizer has no chat "
                "template; leave chat out"
            )
        turns = [[{"role": "user", "content": text}] for text in texts]
        made: list[str] = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return made

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids, with what the tokenizer puts before a text, and behind it for an encoder."""
        before, behind = ([], []) if self.spec.chat else self._frame
        behind = behind if self.crossing else []
        found = self._ids(texts)
        if self.tokens is not None:
            room = max(1, self.tokens - len(before) - len(behind))
            found = [ids[-room:] for ids in found]
        return [[*before, *ids, *behind] for ids in found]

    def continuations(self, texts: Sequence[str], answers: Sequence[str]) -> list[Ids]:
        """Token ids of each answer behind its prompt, without an end; never cut.

        A decoder alone reads one text: the answer's tokens are those that joining the two adds.
        Between them is a space, but for chats and where the prompt ends in white space.
        """
        if self.crossing:
            return self._ids(answers)
        gaps = ["" if self.spec.chat or not t or t[-1].isspace() else " " for t in texts]
        behind = [gap + answer for gap, answer in zip(gaps, answers, strict=True)]
        joined = self._ids([t + a for t, a in zip(texts, behind, strict=True)])
        out = []
        for whole, prompt, alone in zip(joined, self._ids(texts), self._ids(behind), strict=True):
            # Where a token spans the border, the answer is read by itself.
            out.append(whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone)
        return out

    def _filled(self, row: Mapping[str, Any]) -> str:
        if self.spec.template is None:
            text = row[self.spec.prompt or ""]
            if not isinstance(text, str):
                raise UsageError(
                    f"task {self.spec.name}: prompt column {self.spec.prompt!r} holds more than "
                    "texts; name another column, or set template"
                )
            return text
        try:
            return self.spec.template.format_map(row)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise UsageError(
                f"task {self.spec.name}: template does not fit a row ({first_line(error)}); "
                "correct template"
            ) from None

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        made: list[Ids] = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return made

    @functools.cached_property
    def _frame(self) -> tuple[Ids, Ids]:
        """What the tokenizer puts around every text."""
        plain = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return full[:at], full[at + len(plain) :]
