"""A language model and its tokenizer from a GGUF file, as transformers reads them.

Quantised tensors are written out; the rows of q and k, which GGUF interleaves for rotary
embeddings, come back in transformers' order.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmark.core.errors import CheckpointError, brief
from benchmark.io.loaders import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model(path: Path) -> PreTrainedModel:
    """The causal language model, in float32 and in evaluation mode.

    Raises:
        CheckpointError: the file is no GGUF model that transformers knows.
    """
    from transformers import AutoModelForCausalLM

    found = _read(AutoModelForCausalLM, path, dtype=torch.float32)
    return found.eval().requires_grad_(False)


def tokenizer(path: Path) -> Any:
    """Its tokenizer (a ``PreTrainedTokenizerFast``); raises as :func:`model` does."""
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, path)


def _read(auto: Any, path: Path, **options: Any) -> Any:
    # Its progress goes to stderr whatever transformers is told.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            return auto.from_pretrained(path.parent, gguf_file=path.name, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF model: {brief(error)}") from error
