"""Checkpoint folders → backbones. Which kind a folder is, its own configuration says."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import operator
import re
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmark.api.specs import did_you_mean
from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.state import State
from benchmark.io import adapter_folders
from benchmark.io.folders import Checkpoint, load
from benchmark.io.loaders import CLIP_CONFIG
from benchmark.testbeds.declared import bodies, words
from benchmark.testbeds.declared.backbones import (
    Backbone,
    ImageBackbone,
    Pooling,
    TextBackbone,
    pooled_image,
)
from benchmark.testbeds.declared.opening_language import (
    has_decoder,
    is_causal,
    language,
    whole_of,
)
from benchmark.testbeds.declared.pixels import Channels, Pixels
from benchmark.testbeds.declared.places import Place, folder, place

_REVISION = 2  # of what a backbone computes: raise it when that changes
_CLASS_TOKEN = re.compile(r"(^|[._])(cls_token|class_token|class_embedding)$")
_PROJECTION = "visual_projection.weight"


@dataclass(frozen=True)
class Input:
    """What may be set of the input; None: as the folder says.

    ``side`` in pixels; ``mean``, ``std`` of channels within 0..1; ``tokens``: a text's length.
    ``asked``: prompts have answers (:class:`LanguageBackbone`).
    """

    side: int | None = None
    mean: Channels | None = None
    std: Channels | None = None
    tokens: int = 32
    pooling: Pooling = "auto"
    asked: bool = False


def open_backbone(place: Place, wanted: Input | None = None) -> Backbone:
    """The backbone of a checkpoint folder or a pinned hub repository; always the same object.

    Raises:
        AssetError: the hub repository is not at hand and cannot be fetched.
        CheckpointError: the folder is no checkpoint, or damaged.
        UsageError: an architecture that gives no features, or an input it cannot take.
    """
    return _open(place, wanted or Input(), place.content)


def named_base(base: str, pretrained: str | None, root: Path, revision: str | None) -> Place:
    """The place of a testbed's base: a folder, a hub id, or ``open_clip:NAME``.

    ``pretrained`` goes with an open_clip name: a tag of open_clip's list, which leads to a hub
    repository, or a local folder.

    Raises:
        UsageError: an unknown name or tag; no such folder; a hub id without its pin.
    """
    kind, colon, name = base.partition(":")
    if not colon or kind != "open_clip":
        if pretrained:
            raise UsageError('pretrained goes with base = "open_clip:NAME" only; leave it out')
        return place(base, root, revision, "base")
    import open_clip

    if name not in open_clip.list_models():
        raise UsageError(
            f"open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise UsageError(
            f"base {base!r} needs pretrained: a local folder, or one of {', '.join(tags)}"
        )
    if pretrained in tags:
        repository = str(open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub") or "").strip(
            "/"
        )
        if not repository:
            raise UsageError(
                f"open_clip's weights {name} {pretrained} are a pickle, which is never read; "
                "take another tag, or save them as an open_clip folder with safetensors"
            )
        return place(repository, root, revision, f"base {base} {pretrained}")
    return place(pretrained, root, revision, f"pretrained (one of {', '.join(tags)}, or a folder)")


def read(backbone: Backbone, place: Place, base_place: Place | None = None) -> State:
    """Another checkpoint of the same architecture (a published fine-tune), float32 on the CPU.

    A CLIP image tower saved without its projection gets the base's: fine-tunes leave it alone. A
    LoRA folder is read on the base, which is at ``base_place``.

    Raises:
        AssetError, CheckpointError: as :func:`open_backbone`; or it does not fit the base.
    """
    path = folder(place)
    if base_place is not None and adapter_folders.is_adapter(path):
        state = _adapted(path, folder(base_place))
    else:
        state = _parts(load(path)).state
    base = backbone.weights()
    # A CLIPVisionModel's names lack the prefix that the model with a projection has.
    if _PROJECTION in base and not any(key.startswith("vision_model.") for key in state):
        state = {f"vision_model.{key}": value for key, value in state.items()}
    if _PROJECTION in base and _PROJECTION not in state:
        state = {**state, _PROJECTION: base[_PROJECTION]}
    extra = state.keys() - base.keys()
    return backbone.fits({k: v for k, v in state.items() if k not in extra}, f"expert {path}")


def _adapted(path: Path, base: Path) -> State:
    """The base with an adapter merged in, as :func:`_parts` names it."""
    whole = adapter_folders.lifted(load(base))
    adapted = adapter_folders.load(path, whole).state
    prefix = _parts(whole).prefix
    return {
        key.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for key, value in adapted.items()
        if key.startswith(prefix)
    }


@functools.lru_cache(maxsize=4)
def _open(place: Place, wanted: Input, content: str) -> Backbone:
    path = folder(place)
    checkpoint = load(path)
    if checkpoint.kind == "diffusers":
        raise UsageError(f"{path} draws images; say in [drawing] which judge sees them")
    parts = _parts(checkpoint)
    constants = bodies.constants(parts.module)
    whole = whole_of(checkpoint.model, parts.module, parts.prefix)
    bodies.to_meta(parts.module)
    identity = [_REVISION, content, astuple(wanted)]
    common: dict[str, Any] = {
        "module": parts.module,
        "weights": lambda: parts.state,
        "content": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "constants": constants,
    }
    config = parts.config
    reads = "x" if checkpoint.kind == "open_clip" else parts.module.main_input_name
    if wanted.asked and reads != "input_ids":
        raise UsageError(
            f"{path}: score is for language models, and this base reads no texts; declare image "
            "and label"
        )
    if checkpoint.kind == "open_clip":
        return _open_clip(path, wanted, common)
    if parts.projected:
        return ImageBackbone(
            **common,
            pixels=_pixels(path, config, wanted),
            pool=operator.attrgetter("image_embeds"),
            extra=_resized(parts.module, config, wanted.side),
            texts=functools.partial(words.clip_texts, path) if parts.has_text else None,
        )
    if reads == "pixel_values":
        pooling = wanted.pooling
        if pooling == "last":
            raise UsageError('pooling = "last" is for texts; an image has no last token')
        if pooling == "auto":
            tokens = any(_CLASS_TOKEN.search(key) for key in parts.state)
            pooling = "class" if tokens else "pooler"
        if pooling != "pooler":
            _drop_pooler(parts, common)
        return ImageBackbone(
            **common,
            pixels=_pixels(path, config, wanted),
            pool=functools.partial(pooled_image, pooling=pooling),
            extra=_resized(parts.module, config, wanted.side),
        )
    if reads == "input_ids":
        if wanted.pooling != "pooler":
            _drop_pooler(parts, common)
        text = TextBackbone(
            **common,
            tokenize=functools.partial(words.tokenize, path, wanted.tokens),
            pooling=wanted.pooling,
        )
        crossing = has_decoder(parts.module)
        causal = not crossing and is_causal(text)
        if wanted.asked:
            text = language(path, text, whole, config if crossing or causal else None)
        elif crossing:
            raise UsageError(
                f"{path}: {type(parts.module).__name__} writes answers; give every task a score "
                "with prompt and answer in place of text and label"
            )
        if wanted.pooling == "auto":
            # A causal model's last token alone has seen the whole text.
            text = replace(text, pooling="last" if causal else "mean")
        return text
    raise UsageError(
        f"{path}: a testbed cannot make features with {type(parts.module).__name__}; "
        "use an image model, a CLIP, or a text encoder"
    )


@dataclass
class _Parts:
    """The part of a checkpoint that a testbed runs, float32.

    ``prefix``: what its names begin with in the whole model.
    """

    module: nn.Module
    state: State
    config: Any
    projected: bool = False
    has_text: bool = False
    prefix: str = ""


def _parts(checkpoint: Checkpoint) -> _Parts:
    model: Any = checkpoint.model
    if checkpoint.kind == "open_clip":
        visual: Any = model.visual
        return _Parts(visual, bodies.floats(visual), None, has_text=True)
    if checkpoint.kind == "diffusers":
        return _Parts(model, bodies.floats(model), None)
    config: Any = model.config
    if hasattr(model, "vision_model") and hasattr(model, "visual_projection"):
        if not hasattr(model, "text_model"):
            return _Parts(model, bodies.floats(model), config, projected=True)
        from transformers import CLIPVisionModelWithProjection

        vision = config.vision_config
        vision.projection_dim = config.projection_dim
        with torch.device("meta"):
            tower = CLIPVisionModelWithProjection(vision).eval().requires_grad_(False)
        full = bodies.floats(model)
        state = {key: full[key] for key in tower.state_dict()}
        # Buffers that no file holds come from the whole model.
        buffers = dict(model.named_buffers())
        for name, _ in list(tower.named_buffers()):
            owner, _, last = name.rpartition(".")
            tower.get_submodule(owner)._buffers[last] = buffers[name]
        return _Parts(tower, state, vision, projected=True, has_text=True)
    body, prefix = bodies.body_of(model)
    return _Parts(body, bodies.floats(body), config, prefix=prefix)


def _drop_pooler(parts: _Parts, common: dict[str, Any]) -> None:
    """What is never run is no part of the model: an attack must not measure it."""
    module: Any = parts.module
    if getattr(module, "pooler", None) is None:
        return
    own = [f"pooler.{key}" for key in module.pooler.state_dict()]
    if own:
        module.pooler = None
        for key in own:
            del parts.state[key]
        common["constants"] = {
            k: v for k, v in common["constants"].items() if not k.startswith("pooler.")
        }


def _resized(module: nn.Module, config: Any, side: int | None) -> dict[str, Any]:
    """Position embeddings are interpolated where the input is not of the trained size."""
    trained = getattr(config, "image_size", None)
    if side is None or trained is None or side == trained:
        return {}
    if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        return {"interpolate_pos_encoding": True}
    return {}


def _pixels(path: Path, config: Any, wanted: Input) -> Pixels:
    """From the testbed, else the folder's preprocessor_config.json, else the library's default."""
    file = path / "preprocessor_config.json"
    try:
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; copy it again") from None
    size = own.get("crop_size") or own.get("size") or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    if isinstance(size, (list, tuple)):
        size = size[0]
    if own.get("do_normalize") is False:
        own |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    mean, std = _library_default(config)
    mean = wanted.mean or own.get("image_mean") or mean
    std = wanted.std or own.get("image_std") or std
    return Pixels(wanted.side or int(size), tuple(mean), tuple(std))


def _library_default(config: Any) -> tuple[Any, Any]:
    """Mean and std of the architecture's image processor; CLIP's where the library has none."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    try:
        found = IMAGE_PROCESSOR_MAPPING[type(config)]
    except KeyError:  # CLIP's image part alone
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    classes = found.values() if isinstance(found, dict) else found
    for cls in classes:
        if getattr(cls, "image_mean", None) is not None:
            return cls.image_mean, cls.image_std
    return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def _open_clip(path: Path, wanted: Input, common: dict[str, Any]) -> ImageBackbone:
    import open_clip

    own = json.loads((path / CLIP_CONFIG).read_text(encoding="utf-8")).get("preprocess_cfg") or {}
    size = common["module"].image_size
    side = int(size[0] if isinstance(size, (list, tuple)) else size)
    if wanted.side not in (None, side):
        raise UsageError(f"this open_clip model takes {side} pixels; leave side out")
    mean = wanted.mean or own.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = wanted.std or own.get("std") or open_clip.OPENAI_DATASET_STD
    return ImageBackbone(
        **common,
        pixels=Pixels(side, tuple(mean), tuple(std)),
        argument="x",
        texts=functools.partial(words.open_clip_texts, path),
    )
