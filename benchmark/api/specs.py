"""Spec strings: ``params(scaling=symmetric, perm=random)``, ``a+b``, ``my_file.py:MyDefense``."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from benchmark.core.errors import UsageError

_SPEC = re.compile(r"^(?P<name>[^()\s]+)\s*(?:\((?P<arguments>.*)\))?$", re.DOTALL)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suffix for an error message: the nearest known name, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def _split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth:
        raise UsageError(f"unbalanced brackets in spec {text!r}")
    return [part.strip() for part in [*parts, text[start:]]]


def split_composite(spec: str) -> list[str]:
    """``"params+mergelock(kind=gaussian)"`` → its parts, in the order they are applied."""
    parts = _split(spec, "+")
    if not all(parts):
        raise UsageError(f"empty part in spec {spec!r}; write name or name+name")
    return parts


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """One part of a spec → (name, arguments). Values are Python literals, else plain words."""
    match = _SPEC.match(spec.strip())
    if not match:
        raise UsageError(f"cannot read spec {spec!r}; write name or name(parameter=value, ...)")
    arguments: dict[str, Any] = {}
    for item in _split(match["arguments"] or "", ","):
        if not item:
            continue
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key and value):
            raise UsageError(f"cannot read {item!r} in spec {spec!r}; write parameter=value")
        if key in arguments:
            raise UsageError(f"parameter {key!r} is given twice in spec {spec!r}")
        arguments[key] = _literal(value)
    return match["name"], arguments


def _literal(value: str) -> Any:
    lowered = {"true": True, "false": False, "none": None}
    if value.lower() in lowered:
        return lowered[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        words = value[1:-1] if value[0] + value[-1] in ("[]", "()") else ""
        return [_literal(word) for word in _split(words, ",")] if words else value


def build(cls: type, name: str, arguments: dict[str, Any]) -> Any:
    """An instance of the frozen dataclass ``cls``; its fields are its hyper-parameters.

    Raises:
        UsageError: an unknown parameter, a value of the wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in arguments.items():
        if key not in fields:
            raise UsageError(f"{name} has no parameter {key!r}{did_you_mean(key, fields)}")
        hint = field_type(cls, key)
        if value is None and "none" in typing.get_args(hint):
            value = "none"  # a choice of that name, not the absence of one
        try:
            values[key] = TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{name}: parameter {key}={value!r}: {reason}") from None
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from None


def field_type(cls: type, name: str) -> Any:
    """The type of one field. The class's other annotations are left alone: they may name types that
    only a type checker imports.
    """
    owner = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
    annotation = inspect.get_annotations(owner)[name]
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, vars(sys.modules[owner.__module__]))  # source of that very module


def parameters(method: Any) -> dict[str, Any]:
    """All hyper-parameters of a method, defaults included (what a result depends on)."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


def canonical(name: str, method: Any) -> str:
    """The shortest spec that builds ``method``: parameters off their default, in field order."""
    shown = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if field.init and value != default:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            shown.append(f"{field.name}={text}")
    return f"{name}({', '.join(shown)})" if shown else name
