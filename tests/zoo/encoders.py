"""Encoders of text."""

from __future__ import annotations

from torch import nn

from zoo.shape import (
    HEADS,
    HIDDEN,
    LAYERS,
    SHAPE,
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


MODELS: dict[str, Tiny] = {
    "bert": (_bert, ("input_ids", "attention_mask")),
    "bert-classifier": (_bert_classifier, ("input_ids", "attention_mask")),
    "roberta": (_roberta, ("input_ids", "attention_mask")),
    "distilbert": (_distilbert, ("input_ids", "attention_mask")),
}  # fmt: skip
#: One model per family: the rest differ in their prefixes only.
FAMILIES = ("bert", "distilbert")
