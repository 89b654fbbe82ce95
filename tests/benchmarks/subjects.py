"""What is merged: random models of a ViT-B/32's shapes, and one merge in a process of its own.

``python subjects.py MERGER`` prints how far that merge raises the peak of its process's memory.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from benchmark.api.contracts import Setting
from benchmark.api.methods import merger
from benchmark.core.state import State

MIB = 2**20


def vit_b(experts: int = 2, width: int = 768, layers: int = 12) -> tuple[State, list[State]]:
    """Base and experts, 87.8 M float32 parameters each, every tensor of which moved."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1": (width, 3, 32, 32),
        "positions": (50, width),
        "class": (width,),
        "projection": (width, 512),
    }
    for i in range(layers):
        for name, rows in (("qkv", 3), ("out", 1), ("up", 4)):
            shapes[f"{i}.{name}.weight"] = (rows * width, width)
            shapes[f"{i}.{name}.bias"] = (rows * width,)
        shapes[f"{i}.down.weight"] = (width, 4 * width)
        for name in ("down.bias", "ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
            shapes[f"{i}.{name}"] = (width,)
    rng = torch.Generator().manual_seed(0)
    base = {key: 0.02 * torch.randn(shape, generator=rng) for key, shape in shapes.items()}
    return base, [
        {k: torch.add(v, torch.randn(v.shape, generator=rng), alpha=0.001) for k, v in base.items()}
        for _ in range(experts)
    ]


def merge(spec: str, base: State, experts: list[State]) -> State:
    """All coefficients 1; ``mergekit`` is the tool's own TIES, without our adapter."""
    if spec != "mergekit":
        setting = Setting((1.0,) * len(experts))
        return merger(spec).method.merge(base, experts, setting, None, torch.Generator())
    from mergekit.merge_methods import merge_state_dicts

    names = [f"expert{i}" for i in range(len(experts))]
    with torch.no_grad():
        found: State = merge_state_dicts(
            {"base": base, **dict(zip(names, experts, strict=True))},
            "ties",
            parameters={"weight": dict.fromkeys(names, 1.0), "density": dict.fromkeys(names, 0.2)},
            base="base",
        )
    return found


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(spec: str) -> int:
    """Bytes by which the merge raises the resident memory at its worst, its result included."""
    merge(spec, *vit_b(width=16, layers=1))  # imports and caches are not the merge's
    base, experts = vit_b()
    ctypes.CDLL(None).malloc_trim(0)  # nor is room that glibc holds for reuse
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _memory("VmRSS")
    merge(spec, base, experts)
    return _memory("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(peak(sys.argv[1]))
