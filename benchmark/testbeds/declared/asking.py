"""What a testbed.toml may say of tasks for a language model: how it is asked, and what is right."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Score = Literal["choice", "exact", "generate"]
#: Values of ``extract`` that are no regular expressions.
TEXT, LAST_NUMBER = "text", "last-number"


class Strict(BaseModel):
    """Knows every key. Those in ``later`` are written only where they are set: a testbed.toml that
    does without them means what it meant before they existed, and keeps its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        found: dict[str, Any] = handler(self)
        return {
            key: value
            for key, value in found.items()
            if key not in self.later or getattr(self, key) != fields[key].default
        }


class Asking(Strict):
    """How a language model is asked; all of it stands and falls with ``score``.

    ``prompt``: the column of the question, or ``template``: a text with ``{column}``. ``answer``:
    the column of the answer. ``score``: an example is right if, by ``choice``, the right one of the
    ``choices`` (a column of lists; else the task's classes) has the greatest log-likelihood (per
    token with ``normalise``); ``exact``, greedy decoding gives the answer and ends; ``generate``,
    the same is found (``extract``) in the text that greedy decoding gives and in the answer.
    ``extract``: ``text``, ``last-number``, or a regular expression with one group. ``chat``: the
    prompt is a user's turn in the tokenizer's chat template. ``max_new``: tokens of an answer.
    """

    score: Score | None = None
    prompt: str | None = None
    template: str | None = None
    answer: str = "answer"
    choices: str | None = None
    normalise: bool = False
    extract: str = TEXT
    chat: bool = False
    max_new: int = Field(default=64, ge=1, le=4096)

    @field_validator("extract")
    @classmethod
    def _one_group(cls, extract: str) -> str:
        if extract in (TEXT, LAST_NUMBER):
            return extract
        try:
            groups = re.compile(extract).groups
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(
                f"{extract!r} has {groups} groups; give text, last-number, or a regular "
                "expression with one group"
            )
        return extract

    @field_validator("template")
    @classmethod
    def _columns(cls, template: str | None) -> str | None:
        if template is not None and not columns(template):
            raise ValueError("a template names columns, as in '{question}\\nAnswer:'")
        return template

    @model_validator(mode="after")
    def _whole(self) -> Asking:
        if self.score is None:
            if given := sorted(Asking.model_fields.keys() & self.model_fields_set - {"score"}):
                raise ValueError(
                    f'{given[0]} goes with a language model\'s score: set score = "choice", '
                    '"exact" or "generate"'
                )
            return self
        if (self.prompt is None) == (self.template is None):
            raise ValueError("score needs prompt (a column) or template, and not both")
        only: Mapping[str, Score] = {
            "choices": "choice",
            "normalise": "choice",
            "extract": "generate",
        }
        for field, score in only.items():
            if field in self.model_fields_set and self.score != score:
                raise ValueError(f'{field} goes with score = "{score}"; leave it out')
        return self

    @property
    def asked(self) -> str:
        """The template of the prompt."""
        return self.template if self.template is not None else f"{{{self.prompt}}}"


def columns(template: str) -> list[str]:
    """The columns that ``{}`` in a template name.

    Raises:
        ValueError: a bracket without its other half, or a name left out.
    """
    found = []
    for _, field, _, _ in string.Formatter().parse(template):
        if field is None:
            continue
        name = re.split(r"[.\[]", field)[0]
        if not name or name.isdigit():
            raise ValueError("every {} of a template names a column; {{ and }} are brackets")
        found.append(name)
    return found
