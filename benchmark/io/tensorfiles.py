"""One safetensors file: read with every refusal in one line, written back under its own header.

Writing the header byte for byte as it was read keeps names, order, alignment and metadata, so a
file whose tensors did not change comes back identical. Nothing here, or anywhere else, unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from benchmark.core.errors import CheckpointError, brief, disk_trouble
from benchmark.core.state import State

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_CONVERT = (
    "convert it where you trust it: load it and write it with save_pretrained "
    "(or safetensors.torch.save_file)"
)


@dataclass(frozen=True)
class TensorFile:
    """Layout of one file. ``header``: its bytes before the data; ``names``: tensors by offset."""

    name: str
    header: bytes
    names: tuple[str, ...]


def read(path: Path) -> tuple[TensorFile, State]:
    """Layout and tensors (CPU, memory-mapped) of a safetensors file.

    Raises:
        CheckpointError: missing, cut short, a pickle, a git-lfs pointer, or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole checkpoint folder again")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not weights; run 'git lfs pull' there")
    try:
        tensors = safetensors.torch.load_file(path)
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        table = json.loads(header)
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError, TypeError) as error:
        # Only now: the length that opens a good file can begin with the same bytes.
        if start.startswith((b"PK\x03\x04", b"\x80")):
            raise refuse_pickle(path) from None
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({brief(error)}); "
            "copy it again from its source"
        ) from None
    table.pop("__metadata__", None)
    # Empty tensors share their offset with the next one: the end breaks the tie.
    names = tuple(sorted(table, key=lambda name: table[name]["data_offsets"]))
    return TensorFile(path.name, length + header, names), tensors


def refuse_pickle(path: Path) -> CheckpointError:
    """The error for weights that could run code when loaded."""
    return CheckpointError(f"{path} is a pickle, which is never loaded; {_CONVERT}")


def write(path: Path, layout: TensorFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors``, whose shapes the caller answers for, under ``layout``; under a header of
    their own where they have other dtypes than it names."""
    table = json.loads(layout.header[8:])
    if any(_DTYPES.get(tensors[name].dtype) != table[name]["dtype"] for name in layout.names):
        plain = {name: tensors[name].detach().cpu().contiguous() for name in layout.names}
        save(path, plain, table.get("__metadata__") or {"format": "pt"})
        return
    with path.open("wb") as file:
        file.write(layout.header)
        for name in layout.names:
            value = tensors[name].detach().cpu().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` under a new header.

    Raises:
        OSError: the disk is full or not writable, which safetensors says in words of its own.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except safetensors.SafetensorError as error:
        raise disk_trouble(error, path) from error
