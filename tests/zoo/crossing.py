"""Encoder–decoders."""

from __future__ import annotations

import functools

from torch import nn

from zoo.shape import (
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    SHAPE,
    TEXT,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Tiny,
)

#: Widths of encoders that are not the decoder's.
NARROW, WIDE = 48, 96
_BART = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 1,
    **TEXT,
}


def t5(
    feed_forward: str = "relu", name: str = "T5", head: str = "ForConditionalGeneration"
) -> nn.Module:
    """T5, or one of its kin."""
    import transformers

    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", head))
    fields = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "feed_forward_proj": feed_forward,
        "decoder_start_token_id": 0,
    }
    return model(config(**fields))  # type: ignore[no-any-return]


def bart(name: str = "Bart", head: str = "ForConditionalGeneration", **fields: object) -> nn.Module:
    """BART, or one of the many that are made after it."""
    import transformers

    head = "MTModel" if name == "Marian" else head
    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", head))
    return model(config(**{**_BART, **fields}))  # type: ignore[no-any-return]


def _decoder(name: str) -> nn.Module:
    """A causal language model that reads an encoder."""
    import transformers

    crossing = {"is_decoder": True, "add_cross_attention": True}
    if name == "gpt2":
        text = {"vocab_size": VOCABULARY, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": HIDDEN}
        gpt2 = transformers.GPT2Config(**text, **sizes, **crossing)
        return transformers.GPT2LMHeadModel(gpt2)
    bert = transformers.BertConfig(**TEXT, max_position_embeddings=16, **SHAPE, **crossing)
    return transformers.BertLMHeadModel(bert)


def pair(encoder: str, decoder: str, width: int = WIDTH) -> nn.Module:
    """An encoder of ``width`` and a decoder that reads it, of other families."""
    import transformers

    sizes = {**SHAPE, "hidden_size": width}
    if encoder == "bert":
        config = transformers.BertConfig(**TEXT, max_position_embeddings=16, **sizes)
        return transformers.EncoderDecoderModel(
            encoder=transformers.BertModel(config), decoder=_decoder(decoder)
        )
    vit = transformers.ViTModel(transformers.ViTConfig(**IMAGE, **sizes))
    return transformers.VisionEncoderDecoderModel(encoder=vit, decoder=_decoder(decoder))


def trocr(width: int = NARROW, **fields: object) -> nn.Module:
    """A ViT, and a decoder whose keys and values have its width."""
    import transformers

    vit = transformers.ViTConfig(**IMAGE, **{**SHAPE, "hidden_size": width})
    sizes = {name: value for name, value in _BART.items() if not name.startswith("encoder")}
    config = transformers.TrOCRConfig(
        **{**sizes, "cross_attention_hidden_size": width, "is_decoder": True, **fields}
    )
    return transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(vit), decoder=transformers.TrOCRForCausalLM(config)
    )


_BOTH = (*TOKENS, "decoder_input_ids")
_SEEN = ("pixel_values", "decoder_input_ids")

MODELS: dict[str, Tiny] = {
    "t5": (t5, _BOTH),
    "t5-gated": (functools.partial(t5, "gated-gelu"), _BOTH),
    "mt5": (functools.partial(t5, "gated-gelu", "MT5"), _BOTH),
    "bart": (bart, _BOTH),
    "bart-classifier": (functools.partial(bart, head="ForSequenceClassification"), TOKENS),
    "plbart": (
        functools.partial(bart, "PLBart", tie_word_embeddings=False, scale_embedding=True), _BOTH,
    ),
    "mbart": (functools.partial(bart, "MBart"), _BOTH),
    "pegasus": (functools.partial(bart, "Pegasus"), _BOTH),
    "m2m100": (functools.partial(bart, "M2M100", activation_function="relu"), _BOTH),
    "vit-gpt2": (functools.partial(pair, "vit", "gpt2"), _SEEN),
    "vit-gpt2-wide": (functools.partial(pair, "vit", "gpt2", width=WIDE), _SEEN),
    "trocr": (trocr, _SEEN),
    "bert2bert": (functools.partial(pair, "bert", "bert"), _BOTH),
    "bert2gpt2": (functools.partial(pair, "bert", "gpt2"), _BOTH),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("t5", "bart")
KIN = (
    "t5-gated", "mt5", "bart-classifier", "plbart", "mbart", "pegasus", "vit-gpt2", "bert2gpt2",
)  # fmt: skip
#: How wide the encoder is, where that is not as wide as the decoder.
WIDTHS = {"trocr": NARROW, "vit-gpt2-wide": WIDE}
#: Those with a gated MLP.
GATED = ("t5-gated", "mt5")
