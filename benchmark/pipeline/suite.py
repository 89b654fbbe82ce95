"""Suites: which testbed, victims, defenses, attacks, mergers and seeds. TOML a user can copy."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmark.api.specs import did_you_mean
from benchmark.core.errors import UsageError
from benchmark.core.keys import sha
from benchmark.core.paths import read_text
from benchmark.pipeline.published import Published


class Group(BaseModel):
    """A victim and the partners a free-rider merges it with."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    victim: str
    partners: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Group:
        if len({self.victim, *self.partners}) != 1 + len(self.partners):
            raise ValueError("victim and partners must all differ")
        return self


class Suite(BaseModel):
    """One benchmark run. See ``benchmark/suites/quick.toml`` for a commented example."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    testbed: str
    groups: tuple[Group, ...] = Field(min_length=1)
    defenses: tuple[str, ...] = Field(min_length=1)
    attacks: tuple[str, ...] = Field(min_length=1)
    mergers: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    test: int = Field(default=500, ge=10)
    validation_rungs: tuple[int, ...] = Field(default=(8, 32, 128), min_length=1)
    fixed_coefficients: tuple[float, ...] = ()
    #: Of these shared coefficients, rising, one is chosen on validation, as some papers do.
    shared_search: tuple[float, ...] = ()
    #: Measure the benign-use tax too; users adapt the release to the group's first partner's task.
    benign: bool = False
    #: At the fixed coefficients measure every task, and attacked cells too: what papers print.
    fixed_everywhere: bool = False
    #: What the papers printed, shown beside what is measured.
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _sane(self) -> Suite:
        if list(self.validation_rungs) != sorted(set(self.validation_rungs)):
            raise ValueError("validation_rungs must increase")
        if self.validation_rungs[0] < 2:
            raise ValueError("the first validation rung needs at least 2 examples")
        if self.fixed_everywhere and not (self.fixed_coefficients or self.shared_search):
            raise ValueError("fixed_everywhere needs fixed_coefficients or shared_search")
        if list(self.shared_search) != sorted(set(self.shared_search)):
            raise ValueError("shared_search must increase")
        return self

    @property
    def hash(self) -> str:
        """sha256 of the content: two suites with one hash ask the same question."""
        # Fields younger than the first published runs count only where they ask for something.
        later = {name for name in ("fixed_everywhere", "shared_search") if not getattr(self, name)}
        content = self.model_dump(exclude={"name", "description", "published", *later})
        if self.testbed.endswith(".toml") and Path(self.testbed).is_file():
            content["testbed"] = sha(read_text(Path(self.testbed)))
        return sha(content)


def builtin() -> list[str]:
    """Names of the suites that ship with the package."""
    folder = resources.files("benchmark") / "suites"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load(name: str) -> Suite:
    """A shipped suite by name, or any TOML file by path.

    A ``testbed`` that is a TOML file too is looked for beside the suite's.

    Raises:
        UsageError: unknown name, unreadable file, or the first wrong field.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"no such suite file: {path}")
        text = read_text(path)
    elif name in builtin():
        text = (resources.files("benchmark") / "suites" / f"{name}.toml").read_text("utf-8")
    else:
        raise UsageError(f"unknown suite {name!r}{did_you_mean(name, builtin())}")
    try:
        content = tomllib.loads(text)
        if path.suffix == ".toml":
            _beside(content, path)
        return Suite.model_validate(content)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"suite {name}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        hint = ""
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(first["loc"][-1]), Suite.model_fields)
        raise UsageError(f"suite {name}: {where}: {first['msg']}{hint}") from None


def _beside(content: dict[str, Any], path: Path) -> None:
    """Make the path of a suite's own testbed relative to where the program runs.

    Raises:
        UsageError: the file is itself a testbed.
    """
    if "base" in content and "task" in content:
        raise UsageError(
            f"{path} is a testbed, not a suite; run a suite that says testbed = {path.name!r}"
        )
    testbed = content.get("testbed")
    if isinstance(testbed, str) and testbed.endswith(".toml"):
        content["testbed"] = str(path.parent / Path(testbed).expanduser())
