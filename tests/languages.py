"""Tiny random language models with a tokenizer of words, and tasks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.testbeds.declared import Declared

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
WORDS = (*map(str, range(26)), "a", "b", "plus", "is", "yes", "no", "Answer", ":", "user", "bot")
VOCABULARY = len(SPECIAL) + len(WORDS)
BOS, EOS, UNKNOWN, PAD = range(4)
CHAT = "{% for m in messages %}user {{ m['content'] }} {% endfor %}bot :"
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3,
}  # fmt: skip
_FIELDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", _SHAPE),
    "gemma2": ("Gemma2", "ForCausalLM", {**_SHAPE, "final_logit_softcapping": 4.0}),
    "granite": ("Granite", "ForCausalLM", {**_SHAPE, "logits_scaling": 2.0}),
    "cohere": ("Cohere", "ForCausalLM", {**_SHAPE, "logit_scale": 0.25}),
    "phi": (
        "Phi", "ForCausalLM",
        {key: _SHAPE[key] for key in _SHAPE if key not in ("head_dim", "num_key_value_heads")},
    ),
    "gpt2": (
        "GPT2", "LMHeadModel",
        {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    ),
    "t5": (
        "T5", "ForConditionalGeneration",
        {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "initializer_factor": 3.0, "decoder_start_token_id": PAD,
        },
    ),
    "bart": (
        "Bart", "ForConditionalGeneration",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 64, "init_std": 0.3, "decoder_start_token_id": EOS,
        },
    ),
}  # fmt: skip
CAUSAL, CROSSING = ("llama", "gemma2", "granite", "cohere", "phi", "gpt2"), ("t5", "bart")
NAMES = (*CAUSAL, *CROSSING)


def build(name: str) -> Any:
    """The model ``name``, which ends a text after a few words and seldom writes special tokens."""
    import transformers

    family, kind, fields = _FIELDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_TOKENS, **fields)
    model: nn.Module = getattr(transformers, f"{family}{kind}")(config).eval()
    model.requires_grad_(False)
    head = model.get_output_embeddings().weight
    head[[BOS, UNKNOWN, PAD]] *= 0.1
    head[EOS] *= 1.5
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias += 0.3 * torch.randn(bias.shape)
        bias[EOS] += 1.5
    return model


def tokenizer(folder: Path, chat: bool = False, pad: bool = True) -> Any:
    """A token per word; every text is opened by <s> and closed by </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbered = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if chat:
        found.chat_template = CHAT
    found.save_pretrained(folder)
    return found


def ids(text: str) -> list[int]:
    """Token ids of a text, with nothing around it."""
    return [(*SPECIAL, *WORDS).index(word) for word in text.split()]


def said(tokens: Sequence[int]) -> str:
    """A text as its words."""
    return " ".join((*SPECIAL, *WORDS)[token] for token in tokens)


def prompt(name: str, text: str) -> Tensor:
    """What the model ``name`` is given for a text by itself, (1, L)."""
    behind = [EOS] if name in CROSSING else []
    return torch.tensor([[BOS, *ids(text), *behind]])


def generated(model: Any, asked: Tensor, new: int) -> list[int]:
    """What transformers generates for one prompt, greedily, with nothing padded."""
    found = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[0].tolist()
    return found[1:] if model.config.is_encoder_decoder else found[asked.shape[1] :]


def along(name: str, model: Any, asked: Tensor, answer: Sequence[int]) -> Tensor:
    """The model's own logits where each token of ``answer`` is asked for, (T, vocabulary)."""
    if name in CROSSING:
        start = model.config.decoder_start_token_id
        read = torch.tensor([[start, *answer[:-1]]])
        return model(input_ids=asked, decoder_input_ids=read).logits[0]
    read = torch.cat([asked, torch.tensor([answer[:-1]], dtype=torch.int64)], 1)
    return model(input_ids=read).logits[0, asked.shape[1] - 1 :]


def questions(count: int) -> list[str]:
    """Texts of 2 to 6 words, all different."""
    return [" ".join(WORDS[(7 * i + j * j) % 26] for j in range(2 + i % 5)) for i in range(count)]


def jsonl(folder: Path, rows: Sequence[Mapping[str, Any]], test: int = 20) -> Path:
    """The last ``test`` rows to test on, the others to train on."""
    folder.mkdir(parents=True)
    for split, part in {"train": rows[:-test], "test": rows[-test:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return folder


def folder(root: Path, name: str, **options: bool) -> Any:
    """The model ``name`` below ``root``, with its tokenizer."""
    model = build(name)
    model.save_pretrained(root / name)
    tokenizer(root / name, **options)
    return model


def declare(root: Path, base: str, task: str, more: str = "") -> Declared:
    """A testbed of one task ``t`` on the data in ``data``."""
    path = root / "testbed.toml"
    path.write_text(
        f'name = "lm"\nbase = "{base}"\n{more}\n[[task]]\nname = "t"\ndata = "data"\n{task}\n'
    )
    return Declared(str(path))
