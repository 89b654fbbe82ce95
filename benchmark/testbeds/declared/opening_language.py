"""A checkpoint folder → a language model that is asked and answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.errors import UsageError
from benchmark.core.state import State
from benchmark.testbeds.declared import bodies, words
from benchmark.testbeds.declared.backbones import TextBackbone
from benchmark.testbeds.declared.generation import Greedy, Signs
from benchmark.testbeds.declared.language import LanguageBackbone
from benchmark.testbeds.declared.vocabulary import Vocabulary

_MEASURED = 8  # tokens


def whole_of(model: Any, body: nn.Module, prefix: str) -> tuple[str, Greedy] | None:
    """The name of the output embeddings of a whole model, and what generates with it.

    None if it has no head for a vocabulary. Taken before the model loses its storage.
    """
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if outputs is None:
        return None
    own = {f"{prefix}{key}" for key in body.state_dict()}
    name = next(f"{key}.weight" for key, part in model.named_modules() if part is outputs)
    outside = {
        key: value.detach().float() if value.is_floating_point() else value.detach()
        for key, value in model.state_dict().items()
        if key not in own
    }
    outside |= bodies.constants(model)
    return (name, Greedy(model, prefix, outside)) if name in outside else None


def has_decoder(module: nn.Module) -> bool:
    """Whether it is an encoder and a decoder."""
    return "decoder_input_ids" in inspect.signature(module.forward).parameters


def is_causal(backbone: TextBackbone) -> bool:
    """Whether no token changes what stands before it: asked of the base itself."""
    state = backbone.base()
    half = _entries(backbone.module) // 2
    ids = torch.tensor([[half, half + 1], [half, half - 1]])
    with torch.no_grad():
        output = backbone.call(state, input_ids=ids, attention_mask=torch.ones_like(ids))
    first = output.last_hidden_state[:, 0]
    return torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5)


def language(
    path: Path, plain: TextBackbone, whole: tuple[str, Greedy] | None, config: Any
) -> LanguageBackbone:
    """``plain`` with the head of its base; ``config`` is None for one that reads both ways.

    Raises:
        UsageError: no language model, or one whose head is no matrix.
        CheckpointError: no tokenizer.
    """
    crossing, kind = has_decoder(plain.module), type(plain.module).__name__
    if config is None:
        raise UsageError(
            f"{path}: {kind} reads both ways and writes no answers; score needs a causal or "
            "encoder-decoder language model: declare text and label"
        )
    if whole is None:
        raise UsageError(
            f"{path}: {kind} has no head for its vocabulary, which score needs; take the folder of "
            "the whole language model (…ForCausalLM, …ForConditionalGeneration)"
        )
    name, greedy = whole
    bodies.to_meta(greedy.whole)
    found = LanguageBackbone(
        **{f.name: getattr(plain, f.name) for f in fields(plain)},
        greedy=greedy,
        signs=_signs(path, config if crossing else None),
        limit=getattr(config, "max_position_embeddings", None),
    )
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return replace(found, vocabulary=_measured(path, found, greedy.outside[name], cap))


def _measured(path: Path, backbone: LanguageBackbone, head: Tensor, cap: float) -> Vocabulary:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(len(head), (1, _MEASURED), generator=rng)
    asked: Mapping[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if backbone.crossing:
        asked = {**asked, "decoder_input_ids": ids}
    state: State = backbone.base()
    with torch.no_grad():
        logits = backbone.greedy.logits(state, asked)[0]
        places = torch.arange(_MEASURED)[None]
        hidden = backbone.forward(state, {**asked, "places": places})[0]
    try:
        return Vocabulary.measured(hidden, logits, head, cap)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _signs(path: Path, crossing: Any) -> Signs:
    """``crossing``: the configuration of an encoder–decoder."""
    tokenizer = words.tokenizer_of(path)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{path}: its tokenizer names no eos_token, and answers need an end; name one in "
            "tokenizer_config.json"
        )
    start = None
    if crossing is not None:
        start = getattr(crossing, "decoder_start_token_id", None)
        if start is None:
            raise UsageError(f"{path}: config.json names no decoder_start_token_id; add it")
    return Signs(tokenizer.eos_token_id, tokenizer.pad_token_id, start)


def _entries(module: Any) -> int:
    return int(module.get_input_embeddings().weight.shape[0])
