"""What a number is the number of: every key, in one place.

| key of | changes with | does not change with |
|---|---|---|
| a method | class, parameters, source of all it imports of its package and ours | other methods |
| an ensemble | the same of every candidate; their order, version, challengers | |
| draws | what draws and its parameters, victim, partners, seed | source, what is only searched |
| a testbed | its data and base, its source, versions of what runs it, device | how it is used |
| expert | testbed, task | defense, seed |
| released | testbed, victim, seed, defense | partners |
| stored | what is released or shipped, the dtype it is stored in | |
| shipped | released | |
| recovered | released, victim, partners, seed, attack | merger |
| control | base, victim, partners, seed, attack | defense |
| merge | merger, base, members in use, setting; draws or data if any | what it leaves out |
| refined | the merge, attack, victim, partners, seed | |
| outcomes | the model's identity, task, split, rows | how the model came about |
| cell | everything above, the suite's sizes, the code that scores | names of suites |

A model's identity is the sha256 of its tensors where the testbed's own forward runs them, so that
equal models share outcomes; where code of its own runs it, it is the key of the node that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from benchmark.api import methods
from benchmark.api.contracts import Ensemble, Testbed
from benchmark.api.methods import Named
from benchmark.api.specs import parameters
from benchmark.core.keys import sha
from benchmark.core.sources import fingerprint as source_hash

if TYPE_CHECKING:
    from benchmark.pipeline.suite import Group, Suite

#: Distributions that run or feed a forward pass: another version of one may give other numbers.
FORWARD = (
    "torch", "torchvision", "transformers", "open_clip_torch", "timm", "peft", "tokenizers",
    "numpy", "scipy", "scikit-learn", "safetensors", "pillow",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Version of each of ``FORWARD`` that is installed."""
    found = {}
    for name in FORWARD:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def method(of: Any, search: bool = True) -> list[Any]:
    """What a method's results depend on: its parameters, and the source it is made of.

    With ``search=False`` without the fields that only say which settings are tried.
    """
    if hasattr(of, "identity"):  # a method that runs in a process of its own
        return [of.spec, of.identity]
    if hasattr(of, "parts"):
        return [type(of).__qualname__, [method(part, search) for part in of.parts]]
    key = [*draws(of, search), source_hash(type(of).__module__)]
    if isinstance(of, Ensemble):
        tried = [[spec, method(methods.attack(spec).method)] for spec in of.candidates]
        key.append([of.version, of.challengers, tried])
    if hasattr(of, "outside"):  # a method that runs an outside program says which version of it
        key.append(of.outside)
    return key


def draws(of: Any, search: bool = False) -> list[Any]:
    """What a method's random numbers may depend on: what it is, not how it is written."""
    if hasattr(of, "parts"):
        return [draws(part, search) for part in of.parts]
    searched = {f.name for f in fields(of) if f.metadata.get("search")} if is_dataclass(of) else {}
    kept = {k: v for k, v in parameters(of).items() if search or k not in searched}
    return [type(of).__qualname__, kept]


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by what it is for, so that no draw depends on what ran before."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def testbed(of: Testbed, device: torch.device) -> str:
    """What every result of a testbed depends on, found without loading its data."""
    return sha(
        "testbed",
        of.content_hash(),
        source_hash(type(of).__module__),
        source_hash("benchmark.evaluation.accuracy"),
        device.type,  # sums differ between a CPU and a GPU
        versions(),
    )


def expert(bench: str, task: str) -> str:
    """``bench``: the key of the testbed, here and below."""
    return sha("expert", bench, task)


def released(bench: str, defense: Named[Any], victim: str, seed: int) -> str:
    return sha("released", bench, victim, seed, defense.spec, method(defense.method))


def stored(made: str, dtype: str) -> str:
    return sha("stored", made, dtype)


def shipped(released: str) -> str:
    return sha("shipped", released)


def recovered(released: str, attack: Named[Any], group: Group, seed: int) -> str:
    """``released``: the key of the node attacked; that of the base for a control."""
    return sha("recovered", released, group.model_dump(), attack.spec, method(attack.method), seed)


def prepared(merger: list[Any], base: str, members: Sequence[str], means: Sequence[Any]) -> str:
    """``merger``: its key without what is only searched, here and below; ``base``, ``members``:
    identities; ``means``: draws and data of a merger that has any."""
    return sha("prepared", merger, base, members, means)


def merge(
    merger: list[Any],
    base: str,
    used: Sequence[Any],
    setting: Mapping[str, Any],
    means: Sequence[Any],
) -> str:
    """``used``: members at a coefficient other than 0; ``setting``: parameters and layers."""
    return sha("merged", merger, base, used, setting, means)


def refined(bench: str, merged: str, attack: Named[Any], group: Group, seed: int) -> str:
    attacked = [attack.spec, method(attack.method)]
    return sha("refined", bench, merged, attacked, group.model_dump(), seed)


def outcomes(bench: str, model: str, task: str, split: str, rows: range) -> str:
    return sha("bits", bench, model, task, split, rows.start, rows.stop)


def gap(bench: str, model: str, reference: str, task: str, rows: int) -> str:
    return sha("gap", bench, model, reference, task, rows)


def bf16(bench: str, model: str, task: str, rows: int) -> str:
    return sha("bf16", bench, model, task, rows)


def quality(bench: str, model: str, task: str, rows: int) -> str:
    return sha("quality", bench, model, task, rows)


def pictures(bench: str, model: str, task: str) -> str:
    return sha("pictures", bench, model, task)


def growth(model: str, reference: str) -> str:
    return sha("growth", model, reference)


def benign(bench: str, model: str, use: str, task: str, rows: int) -> str:
    return sha("benign", bench, model, use, task, rows, source_hash("benchmark.evaluation.benign"))


def question(bench: str, suite: Suite, first_merger: str) -> str:
    """What all cells of a suite share; the cells of ``first_merger`` hold the tax."""
    return sha(
        "question",
        bench,
        suite.test,
        suite.validation_rungs,
        suite.fixed_coefficients,
        suite.fixed_everywhere,
        *([suite.shared_search] if suite.shared_search else []),
        first_merger if suite.benign else "",
        source_hash("benchmark.pipeline.cells"),
    )


def cell(question: str, group: Group, seed: int, parts: Sequence[Any]) -> str:
    """``parts``: spec and key of defense, attack and merger."""
    return sha("cell", question, group.model_dump(), seed, parts)
