"""Encoders of text."""

from __future__ import annotations

import functools

import torch
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


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SHAPE))


def _bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SHAPE)
    return BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SHAPE)
    return RobertaForSequenceClassification(config)


def masked(name: str, tied: bool) -> nn.Module:
    """BERT, RoBERTa, DistilBERT or ELECTRA with the head that tells masked tokens."""
    import transformers

    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", "ForMaskedLM"))
    sizes: dict[str, object] = {**SHAPE}
    if name == "Electra":
        sizes["embedding_size"] = WIDTH
    if name == "DistilBert":
        sizes = {"dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": HIDDEN}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 3}
    built = model(config(**text, **sizes, tie_word_embeddings=tied)).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for value in built.parameters():
        value += 0.1 * torch.randn(value.shape, generator=rng)
    return built  # type: ignore[no-any-return]


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            dim=WIDTH,
            n_heads=HEADS,
            n_layers=LAYERS,
            hidden_dim=HIDDEN,
        )
    )


def _encoder(name: str, head: str = "ForSequenceClassification", **fields: object) -> nn.Module:
    import transformers

    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 3, **SHAPE}
    config = getattr(transformers, f"{name}Config")(**{**shape, **fields})
    return getattr(transformers, f"{name}{head}")(config)  # type: ignore[no-any-return]


_DISENTANGLED = {
    "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False,
}  # fmt: skip
_CLS = {"bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
MODELS: dict[str, Tiny] = {
    "bert": (_bert, ("input_ids", "attention_mask")),
    "bert-classifier": (_bert_classifier, ("input_ids", "attention_mask")),
    "roberta": (_roberta, ("input_ids", "attention_mask")),
    "distilbert": (_distilbert, ("input_ids", "attention_mask")),
    "mpnet": (functools.partial(_encoder, "MPNet"), TOKENS),
    "deberta-v3": (functools.partial(_encoder, "DebertaV2", **_DISENTANGLED), TOKENS),
    "albert": (functools.partial(_encoder, "Albert", embedding_size=16), TOKENS),
    "modernbert": (functools.partial(_encoder, "ModernBert", **_CLS), TOKENS),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("bert", "distilbert", "deberta-v3", "albert", "modernbert")
#: Those whose layers are one; whose gauges outside the blocks have no row; the Q/K gauge group of
#: those where it is not the general one; those with a gated MLP.
SHARED = ("albert",)
INSIDE = ("deberta-v3", "albert")
RESTRICTED = {"modernbert": "rotary"}
GATED = ("modernbert",)
