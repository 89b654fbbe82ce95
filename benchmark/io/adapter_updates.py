"""A task vector as a LoRA adapter: written as factors, in ``peft``'s format.

The update of each weight matrix is factored, by default at the rank that loses nothing but
float32's rounding. Whatever an adapter cannot hold is refused: nothing is lost silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from benchmark.core.errors import UsageError
from benchmark.core.lowrank import Factors, rounding, thin_svd
from benchmark.core.state import State, compatible, norm, task_vector
from benchmark.io import folders, generator_loras, tensorfiles
from benchmark.io.adapter_folders import PREFIX, WEIGHTS, Adapter
from benchmark.io.folders import Checkpoint


@dataclass(frozen=True)
class Update:
    """A task vector as an adapter. ``factors``: module → U, S, Vᵀ of its (out, in) update;
    ``whole``: module → its own tensors. ``error``: ‖τ − B·A‖ / ‖τ‖ over all tensors.
    """

    factors: dict[str, Factors]
    whole: dict[str, State]
    transposed: bool
    error: float

    @property
    def rank(self) -> int:
        """The largest rank of any module; all are written at it."""
        return max((len(s) for _, s, _ in self.factors.values()), default=0)

    @property
    def saves(self) -> bool:
        """Whether the factors are smaller than the matrices."""
        pairs = [(len(u), v.shape[1]) for u, _, v in self.factors.values()]
        return self.rank * sum(n + m for n, m in pairs) < sum(n * m for n, m in pairs)


def factored(
    state: State, base: Checkpoint, rank: int | None = None, whole: Sequence[str] = ()
) -> Update:
    """``state`` as an update of ``base``, of at most ``rank`` where given.

    ``whole``: modules that are stored whole instead of as factors.

    Raises:
        UsageError: something moved that no adapter can hold.
    """
    from transformers.pytorch_utils import Conv1D

    compatible(state, base.state, "the model to be written")
    modules = dict(base.model.named_modules())
    tau = task_vector(state, base.state)
    factors: dict[str, Factors] = {}
    kept: dict[str, State] = {}
    transposed: set[bool] = set()
    lost = 0.0
    for key, delta in tau.items():
        name, _, kind = key.rpartition(".")
        module = modules[name]
        owner = next((w for w in whole if name == w or name.startswith(f"{w}.")), None)
        if owner is not None:
            prefix = f"{owner}."
            kept[owner] = {k: v for k, v in state.items() if k.startswith(prefix)}
            continue
        if kind != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            raise UsageError(
                f"the result also changes {key}, which a LoRA adapter cannot hold; "
                "add --no-adapter to write the whole model"
            )
        conv = isinstance(module, Conv1D)
        floor = rounding(state[key], base.state[key])
        matrix = delta.T if conv else delta  # Conv1D holds (in, out)
        u, s, v = thin_svd(matrix, floor)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        lost += float((matrix.double() - (u * s) @ v).square().sum())
        if len(s):
            factors[name] = u, s, v
            transposed.add(conv)
    if len(transposed) > 1:
        raise UsageError(
            "the result changes Linear and Conv1D weights, which one LoRA adapter cannot hold; "
            "add --no-adapter to write the whole model"
        )
    if not factors:
        raise UsageError(
            "the result does not differ from the base in any weight an adapter can hold; "
            "add --no-adapter to write the whole model"
        )
    return Update(factors, kept, transposed == {True}, lost**0.5 / norm(tau))


def save(
    update: Update,
    base: Checkpoint,
    out: Path,
    *,
    like: Adapter | None = None,
    force: bool = False,
    sources: Sequence[Path] = (),
) -> None:
    """Write ``update`` as peft or diffusers has it: float32, alpha = r, one rank for all modules.

    The base's name and the task are those of ``like``. The folder appears whole or not at all.
    """
    factors = _padded(update)
    if base.kind == "diffusers":
        generator_loras.save(factors, base, out, force=force, sources=sources)
        return
    from peft import LoraConfig

    rank = update.rank
    named = like.config if like else None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(update.factors),
        modules_to_save=sorted(update.whole) or None,
        fan_in_fan_out=update.transposed,
        task_type=named.task_type if named else None,
        base_model_name_or_path=named.base_model_name_or_path if named else str(base.path.name),
        inference_mode=True,
    )
    tensors = {f"{PREFIX}{name}": value for name, value in factors.items()}
    for held in update.whole.values():
        tensors.update({f"{PREFIX}{k}": v.cpu().contiguous() for k, v in held.items()})
    with folders.replacing(out, [base.path, *sources], force) as temporary:
        config.save_pretrained(str(temporary))
        tensorfiles.save(temporary / WEIGHTS, tensors, {"format": "pt"})


def _padded(update: Update) -> dict[str, Tensor]:
    """Factors of one rank for all modules, by the module's name and ``lora_A`` or ``lora_B``."""
    tensors = {}
    for name, (u, s, v) in update.factors.items():
        a, b = s.sqrt()[:, None] * v, u * s.sqrt()
        empty = update.rank - len(s)
        pair = {"A": nn.functional.pad(a, (0, 0, 0, empty)), "B": nn.functional.pad(b, (0, empty))}
        for letter, value in pair.items():
            tensors[f"{name}.lora_{letter}.weight"] = value.float().cpu().contiguous()
    return tensors
