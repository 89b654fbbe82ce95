"""Causal language models."""

from __future__ import annotations

import functools

from torch import nn

from zoo.shape import (
    HEADS,
    HIDDEN,
    LAYERS,
    SHAPE,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Tiny,
)

_DECODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 3, **SHAPE}
_DECODER |= {"bos_token_id": 0, "eos_token_id": 1, "num_key_value_heads": HEADS // 2}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=HIDDEN,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def decoder(name: str, **fields: object) -> nn.Module:
    """A causal language model of transformers: rotary, grouped heads, gated MLP."""
    import transformers

    config = getattr(transformers, f"{name}TextConfig", None)
    config = config or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    return model(config(**{**_DECODER, **fields}))  # type: ignore[no-any-return]


def plain(name: str, **fields: object) -> nn.Module:
    """The same with as many KV heads as heads, or those that ``fields`` say."""
    return decoder(name, **{"num_key_value_heads": HEADS, **fields})


def older(name: str, **fields: object) -> nn.Module:
    """A causal language model whose configuration has names of its own."""
    import transformers

    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", "ForCausalLM"))
    named = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    return model(config(**named, **fields))  # type: ignore[no-any-return]


_PARTIAL = {"partial_rotary_factor": 0.5}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_HEAD_DIM = {"head_dim": WIDTH // HEADS}


#: Grouped products are for single precision only.
_EAGER = {"experts_implementation": "eager"}
MODELS: dict[str, Tiny] = {
    "gpt2": (_gpt2, TOKENS),
    "llama": (functools.partial(decoder, "Llama", **_HEAD_DIM), TOKENS),
    "mistral": (functools.partial(decoder, "Mistral", **_HEAD_DIM), TOKENS),
    "qwen2": (functools.partial(decoder, "Qwen2"), TOKENS),
    "qwen3": (functools.partial(decoder, "Qwen3", **_HEAD_DIM), TOKENS),
    "gemma2": (functools.partial(decoder, "Gemma2", **_HEAD_DIM), TOKENS),
    "gemma3": (functools.partial(decoder, "Gemma3", **_HEAD_DIM), TOKENS),
    "gemma": (functools.partial(decoder, "Gemma", **_HEAD_DIM), TOKENS),
    "starcoder2": (functools.partial(decoder, "Starcoder2"), TOKENS),
    "granite": (functools.partial(decoder, "Granite", **_MULTIPLIERS), TOKENS),
    "olmo2": (functools.partial(decoder, "Olmo2"), TOKENS),
    "stablelm": (functools.partial(decoder, "StableLm", use_qkv_bias=True, **_PARTIAL), TOKENS),
    "stablelm-parallel": (
        functools.partial(decoder, "StableLm", use_parallel_residual=True, **_PARTIAL),
        TOKENS,
    ),
    "smollm3": (functools.partial(decoder, "SmolLM3", no_rope_layers=[1, 0]), TOKENS),
    "mixtral": (functools.partial(decoder, "Mixtral", num_local_experts=3, **_EAGER), TOKENS),
    "qwen2-moe": (
        functools.partial(
            decoder, "Qwen2Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=HIDDEN, mlp_only_layers=[1], **_EAGER,
        ),
        TOKENS,
    ),
    "qwen3-moe": (
        functools.partial(
            decoder, "Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
            head_dim=WIDTH // HEADS, **_EAGER,
        ),
        TOKENS,
    ),
    "cohere2": (
        functools.partial(
            decoder, "Cohere2", sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        TOKENS,
    ),
    "olmo3": (functools.partial(decoder, "Olmo3", sliding_window=4), TOKENS),
    "cohere": (functools.partial(decoder, "Cohere"), TOKENS),
    "phi": (functools.partial(plain, "Phi", **_PARTIAL), TOKENS),
    "opt": (
        functools.partial(plain, "OPT", ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
        TOKENS,
    ),
    "gptj": (
        functools.partial(
            older, "GPTJ", n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_inner=HIDDEN,
            n_positions=16, rotary_dim=4,
        ),
        TOKENS,
    ),
    "gpt-neox": (functools.partial(plain, "GPTNeoX", rotary_pct=0.5), TOKENS),
    "phi3": (functools.partial(decoder, "Phi3", **_PARTIAL), TOKENS),
    "falcon": (functools.partial(plain, "Falcon", ffn_hidden_size=HIDDEN), TOKENS),
    "falcon-new": (
        functools.partial(
            plain, "Falcon", ffn_hidden_size=HIDDEN, new_decoder_architecture=True,
            num_kv_heads=HEADS // 2,
        ),
        TOKENS,
    ),
    "falcon-alibi": (
        functools.partial(
            plain, "Falcon", ffn_hidden_size=HIDDEN, alibi=True, bias=True, multi_query=False,
            parallel_attn=False,
        ),
        TOKENS,
    ),
    "bloom": (
        functools.partial(older, "Bloom", hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
        TOKENS,
    ),
    "mpt": (
        functools.partial(
            older, "Mpt", d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=16,
        ),
        TOKENS,
    ),
}  # fmt: skip
#: The Q/K gauge group of those where it is not the general one.
RESTRICTED = {
    "llama": "rotary", "mistral": "rotary", "qwen2": "rotary", "gemma2": "rotary",
    "qwen3": "sign", "gemma3": "sign",
    "gemma": "rotary", "starcoder2": "rotary", "granite": "rotary", "olmo2": "sign",
    "olmo3": "sign", "cohere2": "rotary", "mixtral": "rotary", "qwen2-moe": "rotary",
    "qwen3-moe": "sign",
    "stablelm": "rotary", "stablelm-parallel": "rotary", "smollm3": "rotary", "cohere": "rotary",
    "phi": "rotary", "gptj": "rotary", "gpt-neox": "rotary", "phi3": "rotary",
    "falcon": "rotary", "falcon-new": "rotary",
}  # fmt: skip
#: Those with fewer KV heads than heads: half as many, but one in the multi-query ``falcon``.
GROUPED = tuple({*RESTRICTED} - {"phi", "gptj", "gpt-neox", "falcon"})
#: Those with a gated MLP.
GATED = tuple({*GROUPED} - {"starcoder2", "falcon-new"})
#: Mixtures of experts, whose gauges outside the blocks have no row.
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")
KIN = (
    "qwen2-moe", "qwen3-moe", "olmo3", "mistral", "granite", "smollm3", "gemma3", "starcoder2",
    "stablelm-parallel", "cohere2", "falcon-new",
)  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("gpt2", "qwen2", "qwen3", "olmo2", "cohere", "gptj", "phi3", "falcon", "bloom")
