"""Sizes of the tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from torch import nn

WIDTH, HEADS, LAYERS, HIDDEN = 64, 8, 2, 96
VOCABULARY, LENGTH, BATCH = 40, 6, 4
SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": HIDDEN,
}
IMAGE = {"image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
CONV_SIZE = 32
TOKENS = ("input_ids", "attention_mask")

#: The model, and the inputs that it takes.
Tiny = tuple[Callable[[], nn.Module], tuple[str, ...]]
