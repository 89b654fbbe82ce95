"""``list``, ``show``, ``explain``: what there is, without running anything."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from benchmark.api.specs import did_you_mean, field_type
from benchmark.cli.output import Json, console, facts, print_json, table
from benchmark.core.errors import UsageError

if TYPE_CHECKING:
    from benchmark.api.registry import Registry


class Kind(enum.StrEnum):
    """What can be listed."""

    DEFENSES = "defenses"
    ATTACKS = "attacks"
    MERGERS = "mergers"
    TESTBEDS = "testbeds"
    SUITES = "suites"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("list")(list_)
    app.command("show")(show)
    app.command("explain")(explain)


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="One kind only.")] = None,
    as_json: Json = False,
) -> None:
    """List defenses, attacks, mergers, testbeds and suites, third parties' included.

    [bold]Examples[/bold]

      unmergebench list

      unmergebench list attacks --json
    """
    kinds = [kind] if kind else list(Kind)
    found = {each.value: _suites() if each is Kind.SUITES else _rows(each) for each in kinds}
    if as_json:
        print_json(found)
        return
    for name, rows in found.items():
        columns = [column for column in _COLUMNS if any(column in row for row in rows)]
        cells = [[row.get(column, "") for column in columns] for row in rows]
        console().print(table(name, columns, cells))


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, KIND/NAME or file.py:Class.")],
    as_json: Json = False,
) -> None:
    """Show one method, testbed or suite: where it comes from, its parameters, its formula.

    [bold]Examples[/bold]

      unmergebench show params

      unmergebench show attacks/none

      unmergebench show my_file.py:MyDefense

      unmergebench show quick

      unmergebench show my-testbed.toml
    """
    found = _find(name)
    if as_json:
        print_json(found)
        return
    for position, each in enumerate(found):
        if position:
            console().print()
        _print(each)


def explain(
    flag: Annotated[str, typer.Argument(metavar="FLAG", help="A flag of a cell or a report.")],
    as_json: Json = False,
) -> None:
    """Explain a flag: what it means, when it is raised, what to do.

    [bold]Examples[/bold]

      unmergebench explain utility-gate

      unmergebench explain no-benefit --json
    """
    from benchmark.evaluation.flags import FLAGS

    if flag not in FLAGS:
        raise UsageError(f"unknown flag {flag!r}{did_you_mean(flag, FLAGS)}")
    row = FLAGS[flag]
    if as_json:
        print_json({"flag": flag, **row._asdict()})
        return
    pairs = [("meaning", row.meaning), ("raised when", row.raised), ("what to do", row.remedy)]
    console().print(facts(flag, pairs))


_COLUMNS = ("name", "summary", "access", "exact", "role", "testbed", "paper")


def _registries() -> dict[str, Registry[Any]]:
    from benchmark.api.methods import ATTACKS, DEFENSES, MERGERS, TESTBEDS

    return {r.kind: r for r in (DEFENSES, ATTACKS, MERGERS, TESTBEDS)}


def _rows(kind: Kind) -> list[dict[str, Any]]:
    registry = _registries()[kind.value]
    rows = []
    for name in registry.names():
        try:
            cls = registry.get(name)
        except Exception as error:  # a third party's broken package must not hide the others
            reason = f"cannot be loaded: {type(error).__name__}: {error}"
            rows.append({"name": name, "summary": reason})
            continue
        card = cls.card
        row = {"name": name, "summary": card.summary}
        if kind in (Kind.ATTACKS, Kind.MERGERS):
            row["access"] = _access(cls)
        if kind is Kind.DEFENSES:
            row |= {"exact": "yes" if card.exact else "no", "role": card.role}
        rows.append(row | {"paper": _paper(card)})
    return rows


def _suites() -> list[dict[str, Any]]:
    from benchmark.pipeline import suite

    rows = []
    for name in suite.builtin():
        content = suite.load(name)
        rows.append({"name": name, "summary": content.description, "testbed": content.testbed})
    return rows


def _access(cls: Any) -> str:
    task_aware = " + task id" if getattr(cls, "task_aware", False) else ""
    return f"{cls.access.label}{task_aware}"


def _paper(card: Any) -> str:
    return f"arXiv {card.arxiv}" if card.arxiv else card.paper


def _find(name: str) -> list[dict[str, Any]]:
    """Everything called ``name``, of any kind."""
    from benchmark.pipeline import suite

    registries = _registries()
    kind, slash, rest = name.partition("/")
    if ".py:" in name:
        return [_from_file(name, registries)]
    if name.endswith(".toml"):
        return [_toml(name)]
    known = {k: r.names() for k, r in registries.items()} | {Kind.SUITES.value: suite.builtin()}
    plural = kind if kind in known else f"{kind}s"
    if slash and plural in known:  # else a third party's package/name
        known, name = {plural: known[plural]}, rest
    found = [
        _suite(name) if kind == Kind.SUITES else _method(kind, name, registries[kind].get(name))
        for kind, names in known.items()
        if name in names
    ]
    if not found:
        every = {n for names in known.values() for n in names}
        remedy = did_you_mean(name, every) if every else ""
        raise UsageError(f"nothing is called {name!r}{remedy} (see unmergebench list)")
    return found


def _from_file(name: str, registries: Mapping[str, Registry[Any]]) -> dict[str, Any]:
    for kind, registry in registries.items():
        try:
            return _method(kind, name, registry.get(name))
        except UsageError as error:
            if "is not a" not in str(error):
                raise
    raise UsageError(f"{name} is no Defense, Attack, Merger or Testbed; subclass one of them")


def _toml(path: str) -> dict[str, Any]:
    """What a TOML file declares: a testbed or a suite."""
    from benchmark.testbeds.declared import Declared, is_testbed

    if not is_testbed(Path(path)):
        return _suite(path)
    return {"kind": Kind.TESTBEDS.value, **Declared(path).describe()}


def _suite(name: str) -> dict[str, Any]:
    from benchmark.pipeline import suite

    return {"kind": Kind.SUITES.value, **suite.load(name).model_dump(mode="json")}


def _method(kind: str, name: str, cls: Any) -> dict[str, Any]:
    described = {"kind": kind, "name": name}
    if hasattr(cls, "access"):
        described["access"] = _access(cls)
    return {
        **described,
        **{key: value for key, value in dataclasses.asdict(cls.card).items() if value != ""},
        "parameters": _parameters(cls),
        "description": inspect.getdoc(cls) or "",
        "source": (inspect.getdoc(inspect.getmodule(cls)) or "") if inspect.getmodule(cls) else "",
    }


def _parameters(cls: Any) -> list[dict[str, Any]]:
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = field_type(cls, field.name)
        row: dict[str, Any] = {"name": field.name, "type": _type(hint)}
        if default is not dataclasses.MISSING:
            row["default"] = default
        if choices := _choices(hint):
            row["choices"] = choices
        rows.append(row)
    return rows


def _type(hint: Any) -> str:
    if _choices(hint):
        return "choice"
    return hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")


def _choices(hint: Any) -> list[Any]:
    """The values of a Literal, None among them where it is optional."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    parts = typing.get_args(hint)
    literals = [p for p in parts if typing.get_origin(p) is Literal]
    if len(literals) == 1 and set(parts) == {literals[0], type(None)}:
        return [*typing.get_args(literals[0]), None]
    return []


def _print(found: dict[str, Any]) -> None:
    out = console()
    skipped = ("name", "kind", "parameters", "description", "source")
    pairs = [(key, _cell(value)) for key, value in found.items() if key not in skipped]
    if found["kind"] == Kind.SUITES:
        pairs.insert(0, ("description", found["description"]))
    out.print(facts(f"{found['name']} ({found['kind'].removesuffix('s')})", pairs))
    if found.get("parameters"):
        rows = [
            (
                each["name"],
                " | ".join(map(_cell, each["choices"])) if "choices" in each else each["type"],
                _cell(each["default"]) if "default" in each else "required",
            )
            for each in found["parameters"]
        ]
        out.print(table("", ["parameter", "type", "default"], rows))
    if "source" in found:
        for text in (found["source"], found["description"]):
            if text:
                out.print()
                out.print(text, markup=False)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()  # as it is written in a spec
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        mark = "; " if value and isinstance(value[0], dict) else ", "
        return mark.join(_cell(each) for each in value)
    return str(value)
