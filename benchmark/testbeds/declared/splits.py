"""Splits of a declared task: made disjoint, and kept as tensors by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmark.core.data import Split
from benchmark.core.errors import UsageError
from benchmark.testbeds.declared.asking import PARTS, Part


def packed(task: str, parts: Mapping[Part, Split]) -> dict[str, Tensor]:
    """The tensors of all splits by name.

    Raises:
        UsageError: a split of ``task`` is empty.
    """
    out = {}
    for part, split in parts.items():
        if not len(split):
            raise UsageError(f"task {task}: nothing is left for {part}; give it more rows")
        out[f"labels.{part}"] = split.labels
        out |= {f"{part}.{key}": value for key, value in split.inputs.items()}
        out |= {f"answers.{part}.{key}": value for key, value in split.answers.items()}
    return out


def unpacked(found: Mapping[str, Tensor]) -> dict[str, Split]:
    """What :func:`packed` made, as splits again."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}

    return {
        part: Split(below(f"{part}."), found[f"labels.{part}"], below(f"answers.{part}."))
        for part in PARTS
    }


def spelled(classes: Sequence[str]) -> Tensor:
    """Class names as a tensor, which :func:`read_names` reads."""
    return torch.tensor(list("\n".join(classes).encode()), dtype=torch.uint8)


def read_names(found: Tensor) -> tuple[str, ...]:
    """The inverse of :func:`spelled`."""
    return tuple(bytes(found.tolist()).decode().split("\n"))


def divided(parts: Mapping[Part, Split], validation: int) -> dict[Part, Split]:
    """Disjoint splits: of rows that look alike to the model one is kept, in test before the others.

    Without a validation split the first ``validation`` rows of train, at most a fifth, become one.
    """
    seen: set[bytes] = set()
    out: dict[Part, Split] = {}
    for part in ("test", "validation", "train"):
        if part not in parts:
            continue
        rows = []
        for row, identity in enumerate(_identities(parts[part])):
            if identity not in seen:
                seen.add(identity)
                rows.append(row)
        out[part] = parts[part][torch.tensor(rows, dtype=torch.int64)]
    if "validation" not in out:
        held = min(validation, len(out["train"]) // 5)
        out["validation"], out["train"] = out["train"][:held], out["train"][held:]
    return out


def _identities(split: Split) -> list[bytes]:
    """A hash of each row's inputs."""
    columns = [split.inputs[key].contiguous().numpy() for key in sorted(split.inputs)]
    return [
        hashlib.sha256(b"".join(column[row].tobytes() for column in columns)).digest()
        for row in range(len(split))
    ]
