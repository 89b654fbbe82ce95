"""What the two processes say to each other: JSON, a line each; tensors lie in files.

The parent asks (``{"do": ...}``); the child reports (``{"say": ...}``), at times waits for a reply,
and ends with ``done`` or ``failed``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from benchmark.core.errors import MethodError, first_line
from benchmark.core.state import State

#: Bytes of one line: what a defense notes is no place for its weights.
LONGEST = 1 << 24


class Broken(MethodError):
    """The process at the other end does not keep to the protocol."""


def send(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for what JSON cannot say, OSError if nobody listens."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > LONGEST:
        raise ValueError(f"a message of {len(line)} bytes; at most {LONGEST} are taken")
    pipe.write(line)
    pipe.flush()


def receive(pipe: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end.

    Raises:
        Broken: no JSON object on a line.
    """
    line = pipe.readline(LONGEST)
    if not line.endswith(b"\n"):
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Broken("the defense's process sent something that is no message")
    return message


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write plain tensors as safetensors; those that share memory are written apart."""
    from benchmark.io import tensorfiles

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        where = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if where in seen else value
        seen.add(where)
    tensorfiles.save(path, plain, {})


def read_tensors(path: Path) -> State:
    """The tensors of a file in memory of their own, which no later change of the file reaches.

    Raises:
        Broken: no safetensors there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(path.read_bytes()))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Broken(f"the defense's process handed over no tensors: {first_line(error)}") from None


def pack_generator(rng: torch.Generator) -> str:
    return rng.get_state().numpy().tobytes().hex()


def unpack_generator(state: object) -> torch.Generator:
    """Raises Broken: not what :func:`pack_generator` gives."""
    try:
        return torch.Generator().set_state(
            torch.tensor(list(bytes.fromhex(str(state))), dtype=torch.uint8)
        )
    except (ValueError, RuntimeError):
        raise Broken("the defense's process sent no state of a generator") from None
