"""Multiple choice as data sets have it: what may be chosen, and which of it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmark.core.errors import UsageError
from benchmark.testbeds.declared.asking import Part
from benchmark.testbeds.declared.schema import TaskSpec
from benchmark.testbeds.declared.sources import Source


class Choice(NamedTuple):
    """What one example offers; ``right``: the index of its answer."""

    texts: Sequence[str]
    right: int


def chosen(
    source: Source, rows: Mapping[Part, Sequence[Any]], features: Mapping[str, Any]
) -> dict[Part, list[Choice]]:
    """The choices of every row: its own, or the classes of the task.

    Raises:
        UsageError: there are none, or the answer is not among them.
    """
    spec = source.spec
    if spec.choices is not None:
        return {part: [_own(spec, row) for row in each] for part, each in rows.items()}
    feature, values = features[spec.answer], [r[spec.answer] for of in rows.values() for r in of]
    named = spec.classes or getattr(feature, "names", None)
    if not named and not all(isinstance(value, str) for value in values):
        raise UsageError(
            f'task {spec.name}: score = "choice" without choices; set choices (a column of '
            "lists), or classes (the texts in the order of the answers)"
        )
    distinct = list(dict.fromkeys(values))
    index, classes = source.classes(feature, distinct)
    return {
        part: [Choice(classes, index[row[spec.answer]]) for row in each]
        for part, each in rows.items()
    }


def written(spec: TaskSpec, value: Any, feature: Any) -> str:
    """An answer as a text: a class by its name, a whole number without a fraction.

    Raises:
        UsageError: neither a text nor a number.
    """
    names = getattr(feature, "names", None)
    if names and isinstance(value, int):
        return str(names[value])
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise UsageError(
            f"task {spec.name}: answer column {spec.answer!r} holds more than texts and numbers "
            f"({type(value).__name__}); name another column, or leave such rows out of the data"
        )
    return str(value)


def _own(spec: TaskSpec, row: Mapping[str, Any]) -> Choice:
    """Lists of texts; or, as in ARC, ``{"text": [...], "label": [...]}``."""
    offered, answer = row[spec.choices or ""], row[spec.answer]
    marks: list[Any] = []
    if isinstance(offered, Mapping):
        marks, offered = list(offered.get("label") or ()), offered.get("text")
    if not isinstance(offered, Sequence) or isinstance(offered, str) or len(offered) < 2:
        raise UsageError(
            f"task {spec.name}: choices: column {spec.choices!r} must hold lists of two or more "
            "texts; name another column"
        )
    texts = [str(text) for text in offered]
    right = _index(answer, texts, marks)
    if right is None:
        raise UsageError(
            f"task {spec.name}: answer {answer!r} is none of the choices of its row; it is an "
            "index from 0, a letter from A, a label of the choices, or one of the texts"
        )
    return Choice(texts, right)


def _index(answer: Any, texts: list[str], marks: list[Any]) -> int | None:
    if answer in marks:
        return marks.index(answer)
    if answer in texts:
        return texts.index(answer)
    if isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    return answer if isinstance(answer, int) and 0 <= answer < len(texts) else None
