"""Whether two folders hold members of one merge: one function of their weights, one vocabulary.

Equal names and shapes prove neither. Heads of another number, another base of the rotary embedding,
another activation or epsilon leave every tensor as it is and give another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmark.core.errors import CheckpointError
from benchmark.io.folders import Checkpoint
from benchmark.io.inputs import outputs, valid_inputs

#: Fields of a configuration that no forward pass in evaluation mode depends on, or (token ids,
#: labels, lengths) none that the outputs compared here would not show.
_HARMLESS = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|(id2label|label2id|num_labels)|"
    r"problem_type|use_cache|.*drop(out|path)?(_.*)?|init.*|output_.*|return_dict|auto_map|"
    r"finetuning_task|task_specific_params|gradient_checkpointing|.*token_id|tie_\w+|vocab_size|"
    r"max_position_embeddings|mask_.*|ctc_.*|apply_spec_augment|quantization_config|model_type|"
    r"sample_size|keys_to_ignore_.*|pretraining_tp|chunk_size_feed_forward|tokenizer_class|name_or_path"
)
#: max relative |Δlogit| between a State under one configuration and under another, in float32.
_SAME = 1e-3


def check_fits(member: Checkpoint, base: Checkpoint, role: str) -> None:
    """Raise CheckpointError unless ``member``, whose tensors are those of ``base`` by name and
    shape, is a model of its architecture."""
    fields = list(_differences(_settings(base), _settings(member)))
    known = _known(base)
    serious = [
        field
        for field in fields
        if not any(map(_HARMLESS.fullmatch, field[0].split(".")))
        and (known is None or field[0].split(".")[0] in known)
    ]
    if serious:
        name, theirs, own = serious[0]
        raise CheckpointError(
            f"{role} {member.path} has {name} = {_short(own)}, the base {_short(theirs)}: one set "
            "of weights is two models; give models of one configuration"
        )
    if clash := _clash(_vocabulary(base.path), _vocabulary(member.path)):
        token, theirs, own = clash
        raise CheckpointError(
            f"the tokenizer of {role} {member.path} gives {token!r} the id {own}, the base's "
            f"{theirs}; give models of one vocabulary"
        )
    inputs = valid_inputs(member)
    if not inputs or member.model is base.model:
        return
    with torch.inference_mode():
        own, theirs = (outputs(of.model, inputs, member.state) for of in (member, base))
    gap = float((own - theirs).abs().max() / own.abs().max()) if own.shape == theirs.shape else 1.0
    if not gap <= _SAME:
        named = f" (they differ in {', '.join(name for name, *_ in fields[:5])})" if fields else ""
        raise CheckpointError(
            f"{role} {member.path} computes something else under the base's configuration (max "
            f"relative |Δlogit| {gap:.2g}){named}; give models of one configuration"
        )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    config = getattr(checkpoint.model, "config", None)
    if config is not None:
        return dict(config if isinstance(config, Mapping) else config.to_dict())
    content = json.loads((checkpoint.path / "open_clip_config.json").read_text(encoding="utf-8"))
    return dict(content.get("model_cfg", {}))


def _known(checkpoint: Checkpoint) -> set[str] | None:
    """The fields that the configuration's class has; what else stands there is somebody's note."""
    config = getattr(checkpoint.model, "config", None)
    if config is None or isinstance(config, Mapping):
        return None
    try:
        return set(type(config)().to_dict())
    except ValueError:  # one of several parts, which has no defaults
        return None


def _differences(
    base: Mapping[str, Any], member: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(field, the base's value, the member's), fields inside fields with dots."""
    for name in sorted(base.keys() | member.keys()):
        theirs, own = base.get(name), member.get(name)
        if isinstance(theirs, Mapping) and isinstance(own, Mapping):
            yield from _differences(theirs, own, f"{where}{name}.")
        elif theirs != own:
            yield f"{where}{name}", theirs, own


def _vocabulary(path: Path) -> dict[str, int]:
    """Token → id of the tokenizer in a folder; empty where there is none that can be read."""
    try:
        if (file := path / "tokenizer.json").is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            vocab = content["model"]["vocab"]
            if isinstance(vocab, list):
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
            return {**vocab, **added}
        if (file := path / "vocab.json").is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if (file := path / "vocab.txt").is_file():
            return {t: i for i, t in enumerate(file.read_text(encoding="utf-8").split("\n")) if t}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {}


def _clash(base: dict[str, int], member: dict[str, int]) -> tuple[str, int, int] | None:
    """The first token that two vocabularies give different ids."""
    if base == member:
        return None
    return next(
        ((t, i, member[t]) for t, i in base.items() if t in member and member[t] != i), None
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
