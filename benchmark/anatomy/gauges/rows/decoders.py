"""Causal language models."""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.gauges.rows.row import Row

_LLAMA: Any = {
    "embeddings": ("embed_tokens.weight",),
    "needs": ("embed_tokens.weight",),
    "last": ("norm", "final_layernorm"),
    "heads": (("model.", "lm_head", ""), ("model.", "score", "")),
}
_TRANSFORMER_HEADS = (("transformer.", "lm_head", ""), ("transformer.", "score", ""))

DECODERS: tuple[Row, ...] = (
    Row(
        families=("gpt2",),
        norms=("ln_1", "ln_2"),
        cross=("gpt2-cross", "ln_cross_attn"),
        embeddings=("wte.weight", "wpe.weight"),
        needs=("wte.weight",),
        last=("ln_f",),
        together=((("wte.weight",), ("wpe.weight",)),),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("llama", "qwen3"),
        **_LLAMA,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        behind=("post_attention_layernorm", "post_feedforward_layernorm"),
        centred=False,
        offset=1.0,
    ),
    Row(
        families=("llama", "qwen3", "phi3"),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
        centred=False,
    ),
    Row(
        families=("gemma",),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
        centred=False,
        offset=1.0,
    ),
    Row(
        families=("olmo2",),
        **_LLAMA,
        norms=None,
        behind=("post_attention_layernorm", "post_feedforward_layernorm"),
        centred=False,
    ),
    Row(
        families=("starcoder2", "stablelm"),
        **_LLAMA,
        norms=("input_layernorm", "post_attention_layernorm"),
    ),
    Row(
        families=("stablelm", "cohere", "cohere2", "phi"),
        **_LLAMA,
        norms=("input_layernorm", "input_layernorm"),
    ),
    Row(
        families=("opt",),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        embeddings=("embed_tokens.weight", "embed_positions.weight"),
        needs=("embed_tokens.weight",),
        last=("final_layer_norm",),
        together=((("embed_tokens.weight",), ("embed_positions.weight",)),),
        heads=(("model.decoder.", "lm_head", ""), ("model.decoder.", "score", "")),
    ),
    Row(
        families=("gptj",),
        norms=("ln_1", "ln_1"),
        embeddings=("wte.weight",),
        needs=("wte.weight",),
        last=("ln_f",),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("gpt-neox",),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("embed_in.weight",),
        needs=("embed_in.weight",),
        last=("final_layer_norm",),
        heads=(
            ("gpt_neox.", "lm_head", ""), ("gpt_neox.", "embed_out", ""),
            ("gpt_neox.", "score", ""),
        ),
    ),
    *(
        Row(
            families=("falcon", "falcon-alibi"),
            norms=norms,
            embeddings=("word_embeddings.weight",),
            needs=("word_embeddings.weight",),
            last=("ln_f",),
            heads=_TRANSFORMER_HEADS,
        )
        for norms in (
            ("ln_attn", "ln_mlp"),
            ("input_layernorm", "post_attention_layernorm"),
            ("input_layernorm", "input_layernorm"),
        )
    ),
    Row(
        families=("bloom",),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("word_embeddings.weight",),
        needs=("word_embeddings.weight",),
        first=("word_embeddings_layernorm",),
        last=("ln_f",),
        heads=_TRANSFORMER_HEADS,
    ),
    Row(
        families=("mpt",),
        norms=("norm_1", "norm_2"),
        embeddings=("wte.weight",),
        needs=("wte.weight",),
        last=("norm_f",),
        heads=_TRANSFORMER_HEADS,
    ),
)  # fmt: skip
