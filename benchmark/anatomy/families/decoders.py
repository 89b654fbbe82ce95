"""Causal language models."""

from __future__ import annotations

from typing import Any

from benchmark.anatomy.families.row import Family, fused

_LLAMA: Any = {
    "layer": "layers.{}",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "rotary": True,
}
#: Attention alone, for the MLPs are many; which of them a token takes is none of their gauges.
_MIXTURE: Any = {
    **{key: value for key, value in _LLAMA.items() if key not in ("gate", "up", "down")},
    "beside": r"mlp\.(gate|shared_expert_gate)\.weight",
}
#: Separate projections with these names, and a plain MLP.
_PROJECTIONS: Any = {
    "layer": "layers.{}",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
}
#: GPT-NeoX, Falcon, BLOOM.
_FUSED_HEADS: Any = {
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
    "per_head": True,
}
_FALCON: Any = {
    **_FUSED_HEADS,
    **fused("self_attention.query_key_value"),
    "layer": "h.{}",
    "o": "self_attention.dense",
}

DECODERS: tuple[Family, ...] = (
    Family(
        name="gpt2",
        layer="h.{}",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        classes=("GPT2Attention",),
        transposed=True,
    ),
    Family(
        name="qwen3",
        **_LLAMA,
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        classes=("Qwen3Attention", "Gemma3Attention"),
    ),
    Family(
        name="olmo2",
        **_LLAMA,
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        whole_norm=True,
        classes=("Olmo2Attention", "Olmo3Attention"),
    ),
    Family(
        name="llama",
        **_LLAMA,
        classes=(
            "LlamaAttention",
            "MistralAttention",
            "Qwen2Attention",
            "Gemma2Attention",
            "GraniteAttention",
            "SmolLM3Attention",
        ),
    ),
    Family(
        name="qwen3-moe",
        **_MIXTURE,
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        classes=("Qwen3MoeAttention",),
    ),
    Family(name="moe", **_MIXTURE, classes=("MixtralAttention", "Qwen2MoeAttention")),
    Family(name="gemma", **_LLAMA, classes=("GemmaAttention",)),
    Family(name="stablelm", **_LLAMA, classes=("StableLmAttention",)),
    Family(name="cohere", **_LLAMA, interleaved=True, classes=("CohereAttention",)),
    Family(
        name="cohere2",
        **_LLAMA,
        interleaved=True,
        turns="sliding_window",
        classes=("Cohere2Attention",),
    ),
    Family(
        name="starcoder2",
        **_PROJECTIONS,
        o="self_attn.o_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        rotary=True,
        classes=("Starcoder2Attention",),
    ),
    Family(
        name="phi",
        **_PROJECTIONS,
        o="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
        rotary=True,
        classes=("PhiAttention",),
    ),
    Family(
        name="phi3",
        layer="layers.{}",
        **fused("self_attn.qkv_proj"),
        o="self_attn.o_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        down="mlp.down_proj",
        rotary=True,
        classes=("Phi3Attention",),
    ),
    Family(
        name="opt",
        **_PROJECTIONS,
        o="self_attn.out_proj",
        up="fc1",
        down="fc2",
        classes=("OPTAttention",),
        settings=(("do_layer_norm_before", True),),
    ),
    Family(
        name="gptj",
        layer="h.{}",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        rotary=True,
        interleaved=True,
        classes=("GPTJAttention",),
    ),
    Family(
        name="gpt-neox",
        **_FUSED_HEADS,
        layer="layers.{}",
        **fused("attention.query_key_value"),
        o="attention.dense",
        rotary=True,
        classes=("GPTNeoXAttention",),
    ),
    Family(
        name="falcon",
        **_FALCON,
        rotary=True,
        classes=("FalconAttention",),
        settings=(("alibi", False),),
    ),
    Family(
        name="falcon-alibi",
        **_FALCON,
        fixed_heads=True,
        classes=("FalconAttention",),
        settings=(("alibi", True),),
    ),
    Family(
        name="bloom",
        **_FALCON,
        fixed_heads=True,
        classes=("BloomAttention",),
        settings=(("apply_residual_connection_post_layernorm", False),),
    ),
    Family(
        name="mpt",
        layer="blocks.{}",
        **fused("attn.Wqkv"),
        o="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        fixed_heads=True,
        classes=("MptAttention",),
        settings=(("clip_qkv", None),),
    ),
)
