"""Words for text encoders and for the text towers that make heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.core.errors import CheckpointError, first_line
from benchmark.io.folders import load


@torch.no_grad()
def open_clip_texts(path: Path, texts: Sequence[str]) -> Tensor:
    """Unit embeddings by the text tower of an open_clip folder, (n, d)."""
    import open_clip

    # The text tower serves heads only, once: it is not kept in memory.
    model: Any = load(path).model
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    return _in_chunks(lambda chunk: model.encode_text(tokenizer(chunk)), texts)


@torch.no_grad()
def clip_texts(path: Path, texts: Sequence[str]) -> Tensor:
    """Unit embeddings by the text tower of a transformers CLIP folder, (n, d)."""
    model: Any = load(path).model
    tokenizer = tokenizer_of(path)
    length = model.config.text_config.max_position_embeddings

    def embed(chunk: list[str]) -> Tensor:
        tokens = tokenizer(
            chunk, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        output = model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return model.text_projection(output.pooler_output)

    return _in_chunks(embed, texts)


def _in_chunks(
    embed: Callable[[list[str]], Tensor], texts: Sequence[str], size: int = 64
) -> Tensor:
    parts = [embed(list(texts[i : i + size])) for i in range(0, len(texts), size)]
    return nn.functional.normalize(torch.cat(parts).float(), dim=-1)


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a folder; it pads with its end of text where it names nothing else.

    Raises:
        CheckpointError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer: {first_line(error)}") from None
    if found.pad_token is None:
        found.pad_token = found.eos_token  # most decoders were trained without padding
    return found


def tokenize(path: Path, tokens: int, texts: Sequence[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, (n, tokens), by the folder's tokenizer.

    Raises:
        CheckpointError: the folder has none.
    """
    tokenizer = tokenizer_of(path)
    if tokenizer.pad_token is None:
        raise CheckpointError(
            f"{path}: its tokenizer has neither a pad nor an eos token; name one in "
            "tokenizer_config.json"
        )
    made = tokenizer(
        [text[: 200 * tokens] for text in texts],  # what is cut off anyway need not be read
        padding="max_length",
        truncation=True,
        max_length=tokens,
        padding_side="right",
        return_tensors="pt",
    )
    return {name: made[name] for name in ("input_ids", "attention_mask")}
